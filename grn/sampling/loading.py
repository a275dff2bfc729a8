"""From a checkpoint or an export to a refiner that is ready to be sampled, and from that to an export."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig
from torch import nn

from grn.checkpoints.exported import TextSide, is_exported_refiner, load_exported_refiner, save_exported_refiner
from grn.checkpoints.native import Checkpoint, build_network, read_checkpoint, restore, restore_tokenizer, weights_hash
from grn.checkpoints.sampler_config import build_sampler
from grn.networks.adapters import adapter_state, check_adapters, merged
from grn.networks.captioned_refiner import CaptionedRefiner
from grn.networks.text_encoder import ByteT5
from grn.networks.text_refiner import TextRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.configs import plain
from grn.runtime.errors import UserError
from grn.sampling.bundle import RefinerBundle
from grn.sampling.request import AnyRequest, Request
from grn.sampling.text_bundle import TextRefinerBundle
from grn.weights.releases import check_task_given


def load_refiner(ckpt: str, *, ema: str | float | None = None, **hub: Any) -> tuple[RefinerBundle, dict[str, Any]]:
    """A trained refiner in evaluation mode, and what reports say of where it is from.

    Args:
        ckpt: a run folder or checkpoint file of ours, or an exported refiner, here or on the Hub (`hf://owner/name`).
        ema: as in `Checkpoint.weights`.
        hub: as in `is_exported_refiner`.

    Raises:
        UserError: nothing of that kind is there.
    """
    check_task_given(ckpt)
    if not is_exported_refiner(ckpt, **hub):
        checkpoint = read_checkpoint(ckpt)
        if checkpoint.kind == "tokenizer":
            raise UserError(f"ckpt: {checkpoint.path} is a {checkpoint.kind}; only refiners are sampled")
        return bundle_from_checkpoint(checkpoint, ema=ema), {"ckpt": str(checkpoint.path), "step": checkpoint.step}
    if ema is not None:
        raise UserError(f"ema={ema}: {ckpt} holds one set of weights; leave ema out")
    try:
        found = load_exported_refiner(ckpt, **hub)
        arguments: dict[str, Any] = {
            "tokenizer": found.tokenizer,
            "sampler": found.sampler,
            "labeling": found.labeling,
        }
        if found.text is not None and isinstance(found.refiner, TextRefiner):
            bundle = text_refiner_bundle(found.refiner, found.text, **arguments)
        else:
            bundle = RefinerBundle(found.refiner, **arguments)
    except UserError as error:
        raise UserError(f"ckpt: {error}") from None
    bundle.provenance = found.provenance
    return bundle.eval(), {"ckpt": str(found.folder), "step": found.step}


def bundle_from_checkpoint(checkpoint: Checkpoint, *, ema: str | float | None = None) -> RefinerBundle:
    """The refiner of a checkpoint in evaluation mode, with adapters merged; `ema` as in `Checkpoint.weights`.

    Raises:
        UserError: a refiner without its tokenizer.
    """
    source = str(checkpoint.path)
    network = network_from_checkpoint(checkpoint, ema=ema)
    record = checkpoint.contents.get("tokenizer")
    if not record:
        raise UserError(f"ckpt: {source} is a refiner without its tokenizer, and cannot be sampled")
    bundle = bundle_from_config(checkpoint.config, network, restore_tokenizer(record))
    refiner = {"source": source, "step": checkpoint.step, "ema": checkpoint.average(ema)}
    bundle.provenance = {"refiner": refiner, "tokenizer": {"source": record["path"], "step": record["step"]}}
    return bundle.eval()


def bundle_from_config(config: DictConfig, network: Any, tokenizer: HBQTokenizer) -> RefinerBundle:
    """A refiner's bundle with the sampler, the settings and the frozen text encoder of a training config.

    Raises:
        UserError: parts that do not fit together, or values that are none.
    """
    kind, arguments = RefinerBundle, {}
    if isinstance(network, CaptionedRefiner):
        kind = TextRefinerBundle
        arguments = {"text_encoder": instantiate(config.text_encoder)} if network.encoder is None else {}
    settings = plain(config.training, resolve=True)
    arguments |= {key: value for key, value in settings.items() if key in kind.settings}
    return kind(network, tokenizer, build_sampler(config.sampler), **arguments)


def network_from_checkpoint(checkpoint: Checkpoint, *, ema: str | float | None = None) -> Any:
    """The network of a checkpoint, of a refiner or a tokenizer; arguments as of `bundle_from_checkpoint`."""
    source, model, state = str(checkpoint.path), checkpoint.config.model, checkpoint.weights(ema)
    if (settings := checkpoint.config.training.get("adapters")) is not None:
        settings = check_adapters(settings)
        state = merged(state, adapter_state(state), settings["alpha"] / settings["rank"], source=source)
    return restore(lambda: network_from_config(checkpoint.config), model, state, source=source)


def text_refiner_bundle(refiner: TextRefiner, text: TextSide, **arguments: Any) -> TextRefinerBundle:
    """A bundle of a text refiner and what it has beside; `arguments` of `TextRefinerBundle`.

    Raises:
        UserError: parts that do not fit together.
    """
    own = text.encoder if isinstance(text.encoder, ByteT5) else None
    return TextRefinerBundle(
        CaptionedRefiner(refiner, own),
        text_encoder=text.encoder if own is None else None,
        prompts=text.prompts,
        negative_prompt=text.negative_prompt,
        size=text.size,
        frames=text.frames,
        context_latents=text.context_latents,
        prompt_prefix=text.prompt_prefix,
        prompt_suffix=text.prompt_suffix,
        context_prefix=text.context_prefix,
        **arguments,
    )


def save_refiner(bundle: RefinerBundle, folder: str | Path, request: AnyRequest | None = None) -> Path:
    """Writes a folder for others, as `save_exported_refiner` does; it tells `bundle.provenance`, too.

    Args:
        request: what the folder draws where nobody asks for anything; None: as the bundle does.

    Raises:
        UserError: as in `save_exported_refiner`, or a request that the bundle cannot serve.
    """
    complete = bundle.complete(request or Request())
    parts, text = {"refiner": bundle.network, "tokenizer": bundle.tokenizer}, None
    if isinstance(bundle, TextRefinerBundle):
        parts["refiner"] = bundle.refiner
        text = TextSide(
            bundle.text_encoder,
            complete.prompts or (),
            complete.negative_prompt,
            (complete.height, complete.width),
            complete.frames,
            bundle.context_latents,
            bundle.prompt_prefix,
            bundle.prompt_suffix,
            bundle.context_prefix,
        )
        if isinstance(bundle.text_encoder, ByteT5):
            parts["text_encoder"] = bundle.text_encoder
    provenance = {
        part: {**bundle.provenance.get(part, {}), "sha256": weights_hash(network.state_dict())}
        for part, network in parts.items()
    }
    return save_exported_refiner(
        folder,
        refiner=parts["refiner"],
        tokenizer=bundle.tokenizer,
        labeling=bundle.labeling,
        sampler=complete.sampler,
        provenance=provenance,
        text=text,
    )


def network_from_config(config: DictConfig, *, hollow: bool = False) -> nn.Module:
    """The network of a training config, without weights; of a text refiner with its encoder, if that is trained."""
    with torch.device("meta") if hollow else nullcontext():
        network = build_network(config.model)
        if not isinstance(network, TextRefiner):
            return network
        return CaptionedRefiner(network, build_network(config.text_encoder) if _trains_encoder(config) else None)


def _trains_encoder(config: DictConfig) -> bool:
    if "_target_" not in config.text_encoder:
        raise UserError("text_encoder: a text refiner needs one, e.g. text_encoder=byt5_tiny")
    return issubclass(get_class(config.text_encoder._target_), ByteT5)
