"""From a config to a LightningModule that is ready to train."""

import logging
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from lightning import LightningDataModule, LightningModule
from omegaconf import DictConfig
from torch import Tensor

from grn.checkpoints.exported import is_exported_refiner
from grn.checkpoints.native import load_tokenizer
from grn.checkpoints.official_class_refiner import load_official_class_refiner
from grn.checkpoints.official_text_refiner import check_attention, load_official_training
from grn.checkpoints.official_tokenizer import load_official_tokenizer
from grn.data.text_images import PackedDataModule
from grn.data.text_tokens import TextTokensDataModule
from grn.data.tokens import TokenShardsDataModule
from grn.networks.adapters import add_adapters, check_adapters
from grn.networks.captioned_refiner import CaptionedRefiner
from grn.networks.class_refiner import ClassRefiner
from grn.networks.text_encoder import ByteT5
from grn.networks.text_refiner import TextRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.configs import plain
from grn.runtime.errors import UserError
from grn.runtime.secrets import without_secrets
from grn.sampling.loading import bundle_from_config, network_from_config
from grn.training import AnyModule, RefinerModule, TextRefinerModule, TokenizerModule
from grn.weights.kinds import is_pretrained
from grn.weights.mapping import check_state, load_strict
from grn.weights.pretrained import local_file

log = logging.getLogger(__name__)


def module_from_config(config: DictConfig, *, hollow: bool = False) -> AnyModule:
    """The module that a training config describes; its tokenizer is loaded, `model.weights` too where given.

    Averages that come with those are left on the module as `initial_averages`, for `grn.callbacks.EMA` to go on with.

    Args:
        hollow: leaves the network on the meta device, for a strategy to shard and to fill with the module's
            `initial_weights`, those of `model.weights` and `text_encoder.weights`.
    """
    network: Any = network_from_config(config, hollow=hollow)
    kind = _kind_of_module(config, network)
    averages = {}
    starts: list[tuple[Any, str, dict[str, Tensor], str]] = []  # (a part, its prefix, its weights, where they are from)
    if hasattr(network, "initializers") and not hollow:
        network.init_weights(torch.Generator().manual_seed(config.seed))  # as a strategy that shards it does
    if weights := config.model.get("weights"):
        loaded = network.refiner if isinstance(network, CaptionedRefiner) else network
        state, averages = _initial_weights(loaded, weights)
        for average in averages.values():
            check_state(loaded, average, source=str(weights))
        starts.append((loaded, "" if loaded is network else "refiner.", state, str(weights)))
    encoder = network.encoder if isinstance(network, CaptionedRefiner) else None
    if encoder is not None and (start := _encoder_weights(config, encoder)) is not None:
        starts.append((encoder, "encoder.", *start))
    for part, _, state, source in starts:
        (check_state if hollow else load_strict)(part, state, source=source)
    if (adapters := config.training.get("adapters")) is not None:
        if not isinstance(network, CaptionedRefiner):
            raise UserError("training.adapters are of text refiners: leave them out")
        if hollow:
            raise UserError("training.adapters: a network with adapters is not sharded; give another cluster than fsdp")
        add_adapters(network, **check_adapters(adapters), seed=config.seed)
        averages = {}
    extras = {"config": without_secrets(plain(config, resolve=True))}
    settings = {key: value for key, value in plain(config.training, resolve=True).items() if key != "adapters"}
    if issubclass(kind, TokenizerModule):
        weights = {"discriminator": settings["gan_weight"], "perceptual": settings["perceptual_weight"]}
        settings |= {part: None for part, weight in weights.items() if weight == 0}  # nothing to build or download
        module = instantiate(settings, network=network)
        module.checkpoint_extras = extras
        return module
    tokenizer, record = load_tokenizer(
        config.tokenizer.ckpt,
        embed=config.tokenizer.embed,
        official=config.tokenizer.model,
        ema=config.tokenizer.ema,
    )
    bundle = bundle_from_config(config, network, tokenizer)
    module = kind(bundle, **{key: settings[key] for key in settings.keys() - {"_target_", *bundle.settings}})
    module.checkpoint_extras = {**extras, "tokenizer": record}
    module.initial_averages = averages
    if hollow and starts:
        module.initial_weights = {prefix + name: state[name] for _, prefix, state, _ in starts for name in state}
    return module


def check_fits(module: LightningModule, datamodule: LightningDataModule) -> None:
    """Raises:
    UserError: token shards where pixels are needed, of another tokenizer or text encoder, or of another size or
        labels than the model; packs for something else than a text refiner, or sizes that do not fit the tokenizer.
    """
    parts = list(getattr(datamodule, "parts", {"": datamodule}).values())
    if isinstance(module, TextRefinerModule):
        context_prefix = module.bundle.context_prefix
        if odd := [
            getattr(part, "name", type(part).__name__) for part in parts if not isinstance(part, PackedDataModule)
        ]:
            raise UserError(f"data={odd[0]}: a text refiner trains from captioned images, e.g. data=captioned_image")
        for part in parts:
            part.check_packing(module.packed_tokens)
            if context_prefix is not None and getattr(part, "features", None) is not None:
                raise UserError(
                    f"training.context_prefix={context_prefix}: {part.key}.root={part.root} has text features "
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


def _kind_of_module(config: DictConfig, network: Any) -> type[Any]:
    """The class that `training` names.

    Raises:
        UserError: it trains networks of another kind, or the network needs a frozen tokenizer and has none, or is one.
    """
    try:
        kind = get_class(config.training._target_)
    except ValueError as error:
        raise UserError(f"training._target_={config.training._target_}: {error}") from None
    refiner = network.refiner if isinstance(network, CaptionedRefiner) else network
    if refiner is not network:
        fitting, trains = "text_refiner", TextRefinerModule
    elif isinstance(network, HBQTokenizer) or (
        not isinstance(network, ClassRefiner) and issubclass(kind, TokenizerModule)  # somebody's own network
    ):
        fitting, trains = "tokenizer", TokenizerModule
    else:
        fitting, trains = "refiner", RefinerModule
    name, ckpt = type(refiner).__name__, config.tokenizer.ckpt
    if not issubclass(kind, trains) or (trains is RefinerModule and issubclass(kind, TextRefinerModule)):
        raise UserError(
            f"training: {kind.__name__} does not train the model, {name}: give training={fitting}, or another model"
        )
    if trains is TokenizerModule and ckpt is not None:
        raise UserError(f"tokenizer.ckpt={ckpt}: the model is a tokenizer: give tokenizer=none")
    if trains is not TokenizerModule and ckpt is None:
        raise UserError(f"tokenizer.ckpt: the model, {name}, needs a trained tokenizer: give tokenizer.ckpt=...")
    return kind


def _encoder_weights(config: DictConfig, encoder: ByteT5) -> tuple[dict[str, Tensor], str] | None:
    """What a text encoder that is trained along starts from, and where it was found: `text_encoder.weights`, or what
    stands beside the refiner in an export that `model.weights` names; None: from nothing, which is told where the
    refiner has weights."""
    key, path = "text_encoder.weights", config.text_encoder.get("weights")
    if path is None:
        key, path = "model.weights", config.model.get("weights")
    if path is None:
        return None
    whole = is_exported_refiner(local_file(path))
    if not whole and key == "model.weights":
        log.warning(
            "model.weights=%s is a refiner alone: its text encoder, which is trained along, starts from nothing; "
            "text_encoder.weights=... takes an exported one",
            path,
        )
        return None
    if not whole and not is_pretrained(path):
        raise UserError(f"{key}={path}: no export of a text encoder (python -m grn.export writes one)")
    exported = type(encoder).from_pretrained(path, subfolder="text_encoder" if whole else None)
    return exported.state_dict(), f"{key}={path}"


def _initial_weights(network: Any, path: str | Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """(Weights to start from, their averages by decay where the file has any)."""
    path = local_file(path)
    if isinstance(network, (HBQTokenizer, ClassRefiner, TextRefiner)):
        whole = not isinstance(network, HBQTokenizer) and is_exported_refiner(path)
        if whole or is_pretrained(path):
            exported: Any = type(network).from_pretrained(path, subfolder="refiner" if whole else None)
            trained = getattr(exported, "attention", None)  # which no shape of the weights tells
            if isinstance(network, TextRefiner) and trained != network.attention:
                raise UserError(f"model.weights={path} was trained with model.attention={trained}: give that")
            return exported.state_dict(), {}
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
