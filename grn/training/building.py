"""From a config, or from a checkpoint, to a LightningModule that is ready to train or to sample; and to a folder."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, get_method, instantiate
from lightning import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from grn.checkpoints.exported import TextSide, is_exported_refiner, load_exported_refiner, save_exported_refiner
from grn.checkpoints.native import (
    Checkpoint,
    build_network,
    load_tokenizer,
    read_checkpoint,
    restore,
    restore_tokenizer,
    weights_hash,
)
from grn.checkpoints.official_class_refiner import load_official_class_refiner
from grn.checkpoints.official_text_refiner import check_attention, load_official_training
from grn.checkpoints.official_tokenizer import load_official_tokenizer
from grn.checkpoints.sampler_config import sampler_config, target
from grn.data.text_images import PackedDataModule
from grn.data.text_tokens import TextTokensDataModule
from grn.data.tokens import TokenShardsDataModule
from grn.method.request import Request
from grn.method.sampler import Sampler
from grn.method.schedules import FIXED, EntropyGuided
from grn.networks.adapters import adapter_state, add_adapters, check_adapters, merged
from grn.networks.captioned_refiner import CaptionedRefiner
from grn.networks.class_refiner import ClassRefiner
from grn.networks.text_encoder import ByteT5
from grn.networks.text_refiner import TextRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError
from grn.runtime.secrets import without_secrets
from grn.training import RefinerModule, TextRefinerModule
from grn.weights.kinds import is_pretrained
from grn.weights.mapping import check_state, load_strict
from grn.weights.pretrained import local_file
from grn.weights.releases import check_task_given


def module_from_config(config: DictConfig, *, hollow: bool = False) -> LightningModule:
    """The module that a training config describes; its tokenizer is loaded, `model.weights` too where given.

    Averages that come with those are left on the module as `initial_averages`, for `grn.callbacks.EMA` to go on with.

    Args:
        hollow: leaves the network on the meta device, for a strategy to shard and to fill with the module's
            `initial_weights`, those of `model.weights`.
    """
    network, averages, for_strategy = _build_network(config, hollow=hollow), {}, None
    if hasattr(network, "initializers") and not hollow:
        network.init_weights(torch.Generator().manual_seed(config.seed))  # as a strategy that shards it does
    if weights := config.model.get("weights"):
        loaded = network.refiner if isinstance(network, CaptionedRefiner) else network
        state, averages = _initial_weights(loaded, weights)
        for average in averages.values():
            check_state(loaded, average, source=str(weights))
        if hollow:
            check_state(loaded, state, source=str(weights))
            for_strategy = {("" if loaded is network else "refiner.") + name: state[name] for name in state}
        else:
            load_strict(loaded, state, source=str(weights))
    if (adapters := config.training.get("adapters")) is not None:
        if not isinstance(network, CaptionedRefiner):
            raise UserError("training.adapters are of text refiners: leave them out")
        if hollow:
            raise UserError("training.adapters: a network with adapters is not sharded; give another cluster than fsdp")
        add_adapters(network, **check_adapters(adapters), seed=config.seed)
        averages = {}
    plain = OmegaConf.to_container(config, resolve=True)
    if config.tokenizer.ckpt is None:
        return _module(plain, network)
    tokenizer, record = load_tokenizer(
        config.tokenizer.ckpt,
        embed=config.tokenizer.embed,
        official=config.tokenizer.model,
        ema=config.tokenizer.ema,
    )
    module = _module(plain, network, tokenizer, record)
    module.initial_averages = averages
    module.initial_weights = for_strategy
    return module


def module_from_checkpoint(checkpoint: Checkpoint, *, ema: str | float | None = None) -> LightningModule:
    """The module of a checkpoint in evaluation mode, with adapters merged; `ema` as in `Checkpoint.weights`."""
    source, model, state = str(checkpoint.path), checkpoint.config.model, checkpoint.weights(ema)
    if (settings := checkpoint.config.training.get("adapters")) is not None:
        settings = check_adapters(settings)
        state = merged(state, adapter_state(state), settings["alpha"] / settings["rank"], source=source)
    network = restore(lambda: _build_network(checkpoint.config), model, state, source=source)
    plain = OmegaConf.to_container(checkpoint.config)
    if checkpoint.kind == "tokenizer":
        plain["training"] |= {"perceptual_weight": 0.0, "gan_weight": 0.0, "perceptual": None, "discriminator": None}
        return _module(plain, network).eval()
    record = checkpoint.contents.get("tokenizer")
    if not record:
        raise UserError(f"ckpt: {checkpoint.path} is a refiner without its tokenizer, and cannot be sampled")
    module = _module(plain, network, restore_tokenizer(record), record).eval()
    refiner = {"source": source, "step": checkpoint.step, "ema": checkpoint.average(ema)}
    module.provenance = {"refiner": refiner, "tokenizer": {"source": record["path"], "step": record["step"]}}
    return module


def load_refiner(ckpt: str, *, ema: str | float | None = None, **hub: Any) -> tuple[RefinerModule, dict[str, Any]]:
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
        module = module_from_checkpoint(checkpoint, ema=ema)
        return module, {"ckpt": str(checkpoint.path), "step": checkpoint.step}
    if ema is not None:
        raise UserError(f"ema={ema}: {ckpt} holds one set of weights; leave ema out")
    try:
        found = load_exported_refiner(ckpt, **hub)
        arguments = {"tokenizer": found.tokenizer, "sampler": found.sampler, "labeling": found.labeling}
        if found.text is None:
            module = RefinerModule(found.refiner, **arguments)
        else:
            module = text_refiner_module(found.refiner, found.text, **arguments)
    except UserError as error:
        raise UserError(f"ckpt: {error}") from None
    module.provenance = found.provenance
    return module.eval(), {"ckpt": str(found.folder), "step": found.step}


def text_refiner_module(refiner: TextRefiner, text: TextSide, **arguments: Any) -> TextRefinerModule:
    """A module of a text refiner and what it has beside; `arguments` of `TextRefinerModule`.

    Raises:
        UserError: parts that do not fit together.
    """
    own = text.encoder if isinstance(text.encoder, ByteT5) else None
    return TextRefinerModule(
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


def save_refiner(module: RefinerModule, folder: str | Path, request: Request | None = None) -> Path:
    """Writes a folder for others, as `save_exported_refiner` does; it tells `module.provenance`, too.

    Args:
        request: what the folder draws where nobody asks for anything; None: as the module does.

    Raises:
        UserError: as in `save_exported_refiner`, or a request that the module cannot serve.
    """
    request = module.complete(request or Request())
    parts, text = {"refiner": module.network, "tokenizer": module.tokenizer}, None
    if isinstance(module, TextRefinerModule):
        parts["refiner"] = module.refiner
        text = TextSide(
            module.text_encoder,
            request.prompts,
            request.negative_prompt,
            (request.height, request.width),
            request.frames,
            module.context_latents,
            module.prompt_prefix,
            module.prompt_suffix,
            module.context_prefix,
        )
        if isinstance(module.text_encoder, ByteT5):
            parts["text_encoder"] = module.text_encoder
    provenance = {
        part: {**module.provenance.get(part, {}), "sha256": weights_hash(network.state_dict())}
        for part, network in parts.items()
    }
    return save_exported_refiner(
        folder,
        refiner=parts["refiner"],
        tokenizer=module.tokenizer,
        labeling=module.labeling,
        sampler=request.sampler,
        provenance=provenance,
        text=text,
    )


def check_fits(module: LightningModule, datamodule: LightningDataModule) -> None:
    """Raises:
    UserError: token shards where pixels are needed, of another tokenizer or text encoder, or of another size or
        labels than the model; packs for something else than a text refiner, or sizes that do not fit the tokenizer.
    """
    parts = list(getattr(datamodule, "parts", {"": datamodule}).values())
    if isinstance(module, TextRefinerModule):
        if odd := [
            getattr(part, "name", type(part).__name__) for part in parts if not isinstance(part, PackedDataModule)
        ]:
            raise UserError(f"data={odd[0]}: a text refiner trains from captioned images, e.g. data=captioned_image")
        for part in parts:
            part.check_packing(module.packed_tokens)
            if module.context_prefix is not None and getattr(part, "features", None) is not None:
                raise UserError(
                    f"training.context_prefix={module.context_prefix}: {part.key}.root={part.root} has text features "
                    f"of captions as they are: give {part.key}.features=false"
                )
            if isinstance(part, TextTokensDataModule):
                part.check_tokenizer(module.checkpoint_extras["tokenizer"]["sha256"])
                part.check_text_encoder(module.frozen_encoder)
        return
    if any(isinstance(part, PackedDataModule) for part in parts):
        raise UserError(
            f"data={parts[0].name}: packs are for text refiners; others train on images of one size, e.g. "
            "data=imagenet data.num_labels=null data.root=..."
        )
    if not isinstance(datamodule, TokenShardsDataModule):
        labels = getattr(datamodule, "num_labels", None)
        if isinstance(module, RefinerModule) and labels not in (None, module.network.num_labels):
            raise UserError(
                f"model.num_labels={module.network.num_labels} does not fit data.num_labels={labels}: they "
                "must be the number of classes there are"
            )
        return
    if not isinstance(module, RefinerModule):
        raise UserError("data=tokens: a tokenizer trains from pixels; choose their data, e.g. data=digits")
    datamodule.check_tokenizer(module.checkpoint_extras["tokenizer"]["sha256"])
    shape, size = datamodule.manifest["token_shape"], module.network.size
    if shape != [1, size, size]:
        raise UserError(f"model.size={size} does not fit the tokens in data.root={datamodule.root}, {shape} (T, h, w)")
    if datamodule.num_labels != module.network.num_labels:
        raise UserError(
            f"model.num_labels={module.network.num_labels} does not fit data.root={datamodule.root}, "
            f"which has {datamodule.num_labels} labels"
        )


def tell_packing(module: LightningModule, datamodule: LightningDataModule) -> None:
    """Tells the data of a text refiner how many tokens samples have, before training."""
    if isinstance(module, TextRefinerModule):
        for part in getattr(datamodule, "parts", {"": datamodule}).values():
            part.packed_by(module.packed_tokens)


def build_sampler(config: DictConfig | dict, fallback: Sampler | DictConfig | dict | None = None) -> Sampler:
    """A `Sampler` from its config, nulls taken from `fallback` (a trained module's, or the config of one) and then from
    the defaults.

    A schedule's keys fall back only on a schedule of the same kind; but the grid of an entropy-guided one falls back on
    that of any schedule, so that adaptive steps follow what the weights were tuned for.
    """
    if isinstance(fallback, Sampler):
        fallback = sampler_config(fallback)
    configs = (c if isinstance(c, DictConfig) else OmegaConf.create(c or {}) for c in (config, fallback))
    chosen, trained = (OmegaConf.to_container(c, resolve=True) for c in configs)  # in its place, for what it refers to
    schedule, trained_schedule = chosen.pop("schedule", None), trained.pop("schedule", None) or {}
    if schedule is None:
        schedule = trained_schedule
    elif schedule.get("_target_") == trained_schedule.get("_target_"):
        schedule = _filled(schedule, trained_schedule)
    elif schedule.get("_target_") == target(EntropyGuided):
        grid = _grid(trained_schedule)
        if schedule.get("grid") in (None, grid.get("grid")):
            schedule = _filled(schedule, grid)
    chosen = _filled(chosen, trained)
    if schedule:
        chosen["schedule"] = instantiate(_filled(schedule))
    for key in ("_target_", "file"):  # where the values of sampler=calibrated are from
        chosen.pop(key, None)
    return Sampler(**_filled(chosen))


def _grid(fixed: dict[str, Any]) -> dict[str, Any]:
    """The keys of `EntropyGuided` that make it advance along the grid of a fixed schedule's config."""
    kinds = {target(kind): kind for kind in FIXED.values()}
    kind = kinds.get(fixed.get("_target_"))
    return {} if kind is None else {"grid": kind.grid} | {key: fixed.get(key) for key in ("alpha", "cap")}


def _filled(values: dict[str, Any], fallback: dict[str, Any] | None = None) -> dict[str, Any]:
    merged = (fallback or {}) | {key: value for key, value in values.items() if value is not None}
    return {key: value for key, value in merged.items() if value is not None}


def _build_network(config: DictConfig, *, hollow: bool = False) -> nn.Module:
    """The network of a training config, without weights; of a text refiner with its encoder, if that is trained."""
    with torch.device("meta") if hollow else nullcontext():
        network = build_network(config.model)
        if not isinstance(network, TextRefiner):
            return network
        return CaptionedRefiner(network, instantiate(config.text_encoder) if _trains_encoder(config) else None)


def _trains_encoder(config: DictConfig) -> bool:
    if "_target_" not in config.text_encoder:
        raise UserError("text_encoder: a text refiner needs one, e.g. text_encoder=byt5_tiny")
    return issubclass(get_class(config.text_encoder._target_), ByteT5)


def _module(config: dict[str, Any], network: Any, tokenizer: Any = None, record: Any = None) -> LightningModule:
    """Instantiates `training` and a frozen text encoder, and has every checkpoint carry the config, which is all the
    record of that encoder, and the tokenizer's record."""
    settings = dict(config["training"])
    settings.pop("adapters", None)  # of the network
    if tokenizer is None:
        weights = {"discriminator": settings["gan_weight"], "perceptual": settings["perceptual_weight"]}
        settings |= {part: None for part, weight in weights.items() if weight == 0}  # nothing to build or download
        module = instantiate(settings, network=network)
    else:
        if isinstance(network, CaptionedRefiner) and network.encoder is None:
            settings["text_encoder"] = instantiate(config["text_encoder"])
        module = get_method(settings.pop("_target_"))(
            network=network, tokenizer=tokenizer, sampler=build_sampler(config["sampler"]), **settings
        )
    module.checkpoint_extras = {"config": without_secrets(config)} | ({} if record is None else {"tokenizer": record})
    return module


def _initial_weights(network: Any, path: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """(Weights to start from, their averages by decay where the file has any)."""
    path = local_file(path)
    if isinstance(network, ClassRefiner) and is_exported_refiner(path):
        return ClassRefiner.from_pretrained(path, subfolder="refiner").state_dict(), {}
    if isinstance(network, (HBQTokenizer, ClassRefiner, TextRefiner)) and is_pretrained(path):
        return type(network).from_pretrained(path).state_dict(), {}
    if isinstance(network, HBQTokenizer):
        return load_official_tokenizer(path), {}
    if isinstance(network, TextRefiner):
        state, averages = load_official_training(path)
        check_attention(state, network.attention, path, key="model.weights")
        return state, averages
    if isinstance(network, ClassRefiner):
        loaded = load_official_class_refiner(path)
        return loaded["model"], loaded["ema"]
    raise UserError(f"model.weights: no official checkpoints are known for {type(network).__name__}")
