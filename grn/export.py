"""python -m grn.export ckpt=runs/digits_c2i: a trained refiner or tokenizer as a folder to share (conf/export.yaml)."""

import logging
from pathlib import Path
from typing import Any, get_args

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from grn import hbq
from grn.checkpoints.exported import TextSide, is_exported_refiner
from grn.checkpoints.mapping import load_strict
from grn.checkpoints.native import Checkpoint, build_network, load_tokenizer, read_checkpoint, weights_hash
from grn.checkpoints.official_class_refiner import (
    AVERAGED_FASTER,
    SAMPLED,
    load_official_class_refiner,
    save_official_class_refiner,
)
from grn.checkpoints.official_text_refiner import load_official_text_refiner, save_official_text_refiner
from grn.checkpoints.official_tokenizer import save_official_tokenizer
from grn.cli import entry_point
from grn.errors import UserError
from grn.modules import build_sampler, module_from_checkpoint, save_refiner, text_refiner_module
from grn.networks.class_refiner import ClassRefiner
from grn.networks.pretrained import is_pretrained, read_config
from grn.networks.text_encoder import PretrainedT5
from grn.networks.text_refiner import TextRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.training import RefinerModule, TextRefinerModule

log = logging.getLogger(__name__)

FORMATS = ("pretrained", "official")
# What is drawn of the authors' text refiners where nobody asks for anything.
OFFICIAL_PROMPTS, OFFICIAL_SIZE = ["an astronaut riding a horse"], (256, 256)


@entry_point("export")
def main(config: DictConfig) -> None:
    export(config)


def export(config: DictConfig) -> Path:
    """Writes weights for others: a folder that `grn.sample` and `from_pretrained` take, or a file of the authors' kind.

    Returns:
        what was written: `out`, to which format=official adds `.pth` of a refiner, `.ckpt` of a tokenizer.
    """
    if config.format not in FORMATS:
        raise UserError(f"format={config.format}: choose among {', '.join(FORMATS)}")
    here = Path(config.ckpt).expanduser().is_dir()
    if here and (is_exported_refiner(config.ckpt) or (config.format == "pretrained" and is_pretrained(config.ckpt))):
        remedy = "format=official makes one of the authors' files of a tokenizer's, or of a refiner's checkpoint"
        raise UserError(f"ckpt: {config.ckpt} is an export already ({remedy})")
    if config.get("model") is not None:
        out, sha256 = _export_official_refiner(config)
    elif config.tokenizer.model is not None or is_pretrained(config.ckpt):
        out, sha256 = _export_tokenizer(config, config.ckpt)
    else:
        checkpoint = read_checkpoint(config.ckpt)
        out, sha256 = (_export_tokenizer if checkpoint.kind == "tokenizer" else _export_refiner)(config, checkpoint)
    log.info("exported: %s (sha256 of the weights: %s)", out, sha256)
    return out


def _export_tokenizer(config: DictConfig, source: str | Checkpoint) -> tuple[Path, str]:
    tokenizer, record = load_tokenizer(source, embed=False, official=config.tokenizer.model, ema=config.ema, key="ckpt")
    if config.format == "official":
        out = save_official_tokenizer(tokenizer.state_dict(), f"{str(config.out).removesuffix('.ckpt')}.ckpt")
    else:
        out = tokenizer.save_pretrained(config.out, provenance=_provenance(config.ckpt, record))
    return out, record["sha256"]


def _export_refiner(config: DictConfig, checkpoint: Checkpoint) -> tuple[Path, str]:
    if config.tokenizer.ckpt != config.ckpt:
        raise UserError(f"tokenizer.ckpt: {checkpoint.path} knows its tokenizer; leave it out")
    module = module_from_checkpoint(checkpoint, ema=config.ema)
    if config.format == "official":
        network = module.refiner if isinstance(module, TextRefinerModule) else module.network
        return _save_official(config, checkpoint, module), weights_hash(network.state_dict())
    module.sampler = build_sampler(config.sampler, module.sampler)
    if isinstance(module, TextRefinerModule):
        module.ask_for(prompts=config.prompts, height=config.height, width=config.width)
    return _save(module, config.out)


def _save(module: RefinerModule, out: str) -> tuple[Path, str]:
    folder = save_refiner(module, out)
    return folder, read_config(folder / "refiner")["_provenance"]["sha256"]


def _save_official(config: DictConfig, checkpoint: Checkpoint, module: RefinerModule) -> Path:
    """Of classes, the weights as trained and two averages: the chosen one stands for the authors' 0.9999, and for their
    0.9996 too where the run kept none of that decay. Of text, the chosen ones."""
    path = f"{str(config.out).removesuffix('.pth')}.pth"
    if isinstance(module, TextRefinerModule):
        if module.network.encoder is not None:
            raise UserError(f"format=official: the authors' files have no text encoder, and {config.ckpt} trained one")
        return save_official_text_refiner(module.refiner.state_dict(), path)
    has_second = AVERAGED_FASTER in (checkpoint.contents.get("ema") or {})
    averages = {
        SAMPLED: module.network.state_dict(),
        AVERAGED_FASTER: checkpoint.weights(AVERAGED_FASTER if has_second else config.ema),
    }
    return save_official_class_refiner(checkpoint.weights("none"), averages, module.network.position, path)


def _export_official_refiner(config: DictConfig) -> tuple[Path, str]:
    """Of the authors' file, its `model` config and tokenizer; the labeling is the one that fits both."""
    if config.format == "official":
        raise UserError("format=official: ckpt is one of the authors' files already")
    if config.tokenizer.ckpt == config.ckpt:
        raise UserError(
            "tokenizer.ckpt: the authors' refiners do not hold their tokenizer; give tokenizer=official_image "
            "tokenizer.ckpt=HBQ_image_tokenizer_16dim_M4.ckpt (of text: official_joint), or one of ours"
        )
    with torch.device("meta"):
        refiner = build_network(config.model)
    is_text = isinstance(refiner, TextRefiner)
    state, decay = (_official_text_weights if is_text else _official_class_weights)(config)
    load_strict(refiner, state, source=str(config.ckpt))
    tokenizer, record = load_tokenizer(
        config.tokenizer.ckpt, embed=False, official=config.tokenizer.model, ema=config.tokenizer.ema
    )
    arguments = {
        "tokenizer": tokenizer,
        "sampler": build_sampler(config.sampler),
        "labeling": _labeling(refiner, tokenizer),
    }
    if is_text:
        module = text_refiner_module(refiner, _text_side(config), **arguments)
        module.ask_for(prompts=config.prompts, height=config.height, width=config.width)
    else:
        module = RefinerModule(refiner, **arguments)
    module.provenance = {
        "refiner": {"source": str(config.ckpt), "step": None, "ema": decay},
        "tokenizer": {"source": str(config.tokenizer.ckpt), "step": record["step"]},
    }
    return _save(module, config.out)


def _official_class_weights(config: DictConfig) -> tuple[dict[str, Tensor], str]:
    """(The chosen ones, their decay)."""
    decay = SAMPLED if config.ema is None else str(config.ema)
    loaded = load_official_class_refiner(config.ckpt, key="ckpt")
    states = {"none": loaded["model"], **loaded["ema"]}
    if decay not in states:
        raise UserError(f"ema={decay} is not in {config.ckpt}; it holds {', '.join(states)}")
    return states[decay], decay


def _official_text_weights(config: DictConfig) -> tuple[dict[str, Tensor], str]:
    if config.ema not in (None, "none"):
        raise UserError(f"ema={config.ema}: {config.ckpt} holds one set of weights; leave ema out")
    return load_official_text_refiner(config.ckpt, key="ckpt"), "none"


def _text_side(config: DictConfig) -> TextSide:
    if config.text_encoder.get("_target_") != f"{PretrainedT5.__module__}.{PretrainedT5.__qualname__}":
        raise UserError("text_encoder: the authors' text refiners need theirs, text_encoder=umt5_xxl")
    return TextSide(
        encoder=instantiate(config.text_encoder), prompts=OFFICIAL_PROMPTS, negative_prompt="", size=OFFICIAL_SIZE
    )


def _labeling(refiner: ClassRefiner | TextRefiner, tokenizer: HBQTokenizer) -> hbq.Labeling:
    size, sizes = (tokenizer.latent_channels, tokenizer.rounds), (refiner.channels, refiner.classes)
    for labeling in get_args(hbq.Labeling):
        if hbq.num_tokens(*size, labeling) == sizes:
            return labeling
    raise UserError(
        f"model.channels={sizes[0]} model.classes={sizes[1]} do not fit a tokenizer of {size[0]} channels and "
        f"{size[1]} rounds under any labeling"
    )


def _provenance(source: str, record: dict[str, Any]) -> dict[str, Any]:
    return {"source": str(source), "step": record["step"], "sha256": record["sha256"]}


if __name__ == "__main__":
    main()
