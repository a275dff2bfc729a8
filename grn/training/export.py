"""A trained refiner or tokenizer as a folder to share, or as an official file: what `python -m grn.export` does."""

import logging
import zipfile
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from grn.checkpoints.exported import TextSide, is_exported_refiner
from grn.checkpoints.native import Checkpoint, build_network, load_tokenizer, read_checkpoint, weights_hash
from grn.checkpoints.official_class_refiner import (
    AVERAGED_FASTER,
    SAMPLED,
    save_official_class_refiner,
)
from grn.checkpoints.official_text_refiner import (
    check_attention,
    save_official_text_refiner,
)
from grn.checkpoints.official_tokenizer import save_official_tokenizer
from grn.checkpoints.sampler_config import build_sampler
from grn.checkpoints.sharded import verify
from grn.networks.adapters import adapter_state, check_adapters, save_adapters
from grn.networks.text_encoder import PretrainedT5
from grn.networks.text_refiner import TextRefiner
from grn.runtime.errors import UserError
from grn.runtime.files import write_atomically
from grn.sampling.bundle import RefinerBundle
from grn.sampling.loading import bundle_from_checkpoint, save_refiner, text_refiner_bundle
from grn.sampling.official import labeling_of, official_class_weights, official_text_weights
from grn.sampling.request import Request
from grn.sampling.text_bundle import TextRefinerBundle
from grn.weights.kinds import is_pretrained
from grn.weights.mapping import load_strict
from grn.weights.pretrained import read_config

log = logging.getLogger(__name__)

FORMATS = ("pretrained", "official", "adapters")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What is drawn of the authors' text refiners where nobody asks for anything.
OFFICIAL_PROMPTS, OFFICIAL_SIZE = ["an astronaut riding a horse"], (256, 256)


def export(config: DictConfig) -> Path:
    """Writes weights for others: a folder that `grn.sample` and `from_pretrained` take, or a file of the authors' kind.

    Returns:
        what was written: `out`, to which format=official adds `.pth` of a refiner, `.ckpt` of a tokenizer.
    """
    if config.format not in FORMATS:
        raise UserError(f"format={config.format}: choose among {', '.join(FORMATS)}")
    if config.dtype not in DTYPES:
        raise UserError(f"dtype={config.dtype}: choose among {', '.join(DTYPES)}")
    if config.format != "pretrained" and config.dtype != "float32":
        raise UserError(f"dtype={config.dtype} is of format=pretrained; others are float32")
    path = Path(config.ckpt).expanduser()
    if path.is_dir() and (
        is_exported_refiner(config.ckpt) or (config.format == "pretrained" and is_pretrained(config.ckpt))
    ):
        remedy = "format=official makes one of the authors' files of a tokenizer's, or of a refiner's checkpoint"
        raise UserError(f"ckpt: {config.ckpt} is an export already ({remedy})")
    if path.is_file() and zipfile.is_zipfile(path):
        verify(path, key="ckpt")
    if config.format == "adapters" and config.get("model") is not None:
        raise UserError("format=adapters is of a run that trained some: leave model out")
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
    if config.format == "adapters":
        raise UserError(f"format=adapters is of a text refiner that trained some, and {config.ckpt} is a tokenizer")
    tokenizer, record = load_tokenizer(source, embed=False, official=config.tokenizer.model, ema=config.ema, key="ckpt")
    if config.format == "official":
        out = save_official_tokenizer(tokenizer.state_dict(), f"{str(config.out).removesuffix('.ckpt')}.ckpt")
    else:
        if config.dtype != "float32":
            record = record | {"sha256": weights_hash(tokenizer.to(DTYPES[config.dtype]).state_dict())}
        out = tokenizer.save_pretrained(config.out, provenance=_provenance(config.ckpt, record))
    return out, record["sha256"]


def _export_refiner(config: DictConfig, checkpoint: Checkpoint) -> tuple[Path, str]:
    if config.tokenizer.ckpt != config.ckpt:
        raise UserError(f"tokenizer.ckpt: {checkpoint.path} knows its tokenizer; leave it out")
    if config.format == "adapters":
        return _export_adapters(config, checkpoint)
    bundle = bundle_from_checkpoint(checkpoint, ema=config.ema)
    if config.format == "official":
        network = bundle.refiner if isinstance(bundle, TextRefinerBundle) else bundle.network
        return _save_official(config, checkpoint, bundle), weights_hash(network.state_dict())
    return _save(bundle, config)


def _export_adapters(config: DictConfig, checkpoint: Checkpoint) -> tuple[Path, str]:
    if (settings := checkpoint.config.training.get("adapters")) is None:
        raise UserError(f"format=adapters: {checkpoint.path} was trained without (training.adapters)")
    out = Path(f"{str(config.out).removesuffix('.safetensors')}.safetensors").expanduser()
    adapters = adapter_state(checkpoint.weights(config.ema))
    write_atomically(out, lambda temporary: save_adapters(temporary, adapters, check_adapters(settings)))
    return out, weights_hash(adapters)


def _save(bundle: RefinerBundle, config: DictConfig) -> tuple[Path, str]:
    request = Request(
        prompts=None if config.prompts is None else tuple(config.prompts),
        height=config.height,
        width=config.width,
        sampler=build_sampler(config.sampler, bundle.sampler),
    )
    folder = save_refiner(bundle.to(dtype=DTYPES[config.dtype]), config.out, request)
    return folder, read_config(folder / "refiner")["_provenance"]["sha256"]


def _save_official(config: DictConfig, checkpoint: Checkpoint, bundle: RefinerBundle) -> Path:
    """Of classes, the weights as trained and two averages: the chosen one stands for the authors' 0.9999, and for their
    0.9996 too where the run kept none of that decay. Of text, the chosen ones."""
    path = f"{str(config.out).removesuffix('.pth')}.pth"
    if isinstance(bundle, TextRefinerBundle):
        if bundle.network.encoder is not None:
            raise UserError(f"format=official: the authors' files have no text encoder, and {config.ckpt} trained one")
        return save_official_text_refiner(bundle.refiner.state_dict(), path)
    has_second = AVERAGED_FASTER in (checkpoint.contents.get("ema") or {})
    averages = {
        SAMPLED: bundle.network.state_dict(),
        AVERAGED_FASTER: checkpoint.weights(AVERAGED_FASTER if has_second else config.ema),
    }
    return save_official_class_refiner(checkpoint.weights("none"), averages, bundle.network.position, path)


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
    choose = official_text_weights if is_text else official_class_weights
    state, decay = choose(config.ckpt, config.ema, key="ckpt")
    if is_text:
        check_attention(state, refiner.attention, config.ckpt, key="ckpt")
    load_strict(refiner, state, source=str(config.ckpt))
    tokenizer, record = load_tokenizer(
        config.tokenizer.ckpt, embed=False, official=config.tokenizer.model, ema=config.tokenizer.ema
    )
    arguments = {
        "tokenizer": tokenizer,
        "sampler": build_sampler(config.sampler),
        "labeling": labeling_of(refiner, tokenizer),
    }
    if is_text:
        bundle = text_refiner_bundle(refiner, _text_side(config), **arguments)
    else:
        bundle = RefinerBundle(refiner, **arguments)
    bundle.provenance = {
        "refiner": {"source": str(config.ckpt), "step": None, "ema": decay},
        "tokenizer": {"source": str(config.tokenizer.ckpt), "step": record["step"]},
    }
    return _save(bundle, config)


def _text_side(config: DictConfig) -> TextSide:
    if config.text_encoder.get("_target_") != f"{PretrainedT5.__module__}.{PretrainedT5.__qualname__}":
        raise UserError("text_encoder: the authors' text refiners need theirs, text_encoder=umt5_xxl")
    return TextSide(
        encoder=instantiate(config.text_encoder), prompts=OFFICIAL_PROMPTS, negative_prompt="", size=OFFICIAL_SIZE
    )


def _provenance(source: str, record: dict[str, Any]) -> dict[str, Any]:
    return {"source": str(source), "step": record["step"], "sha256": record["sha256"]}
