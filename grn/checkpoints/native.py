"""Our own checkpoints: Lightning's, that know their config, their averages and their tokenizer.

Such a file, or folder (grn/checkpoints/sharded.py), holds what Lightning puts there (`state_dict`, optimiser, loops,
data position) and beside it

- `config`: the resolved config of the run, plain containers;
- `ema`: decay -> parameter name -> float32 tensor; `ema_use`: the decay to sample with;
- `tokenizer` (refiners): `{"model": its config, "official", "path", "ema", "step", "sha256", "state_dict" or None}`.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from grn.checkpoints.mapping import load_strict
from grn.checkpoints.official_class_refiner import is_official_class_refiner
from grn.checkpoints.official_tokenizer import load_official_tokenizer
from grn.checkpoints.reading import check_targets
from grn.checkpoints.sharded import is_sharded_checkpoint, read_either
from grn.errors import UserError
from grn.networks.pretrained import fetch, is_pretrained, read_config
from grn.networks.tokenizer import HBQTokenizer

KINDS = {
    "grn.training.RefinerModule": "refiner",
    "grn.training.TextRefinerModule": "text refiner",
    "grn.training.TokenizerModule": "tokenizer",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: its `path`, `config` and the raw `contents`."""

    path: Path
    config: DictConfig
    contents: dict[str, Any]

    @property
    def kind(self) -> str:
        """`refiner` (of classes), `text refiner` or `tokenizer`."""
        return KINDS[self.config.training._target_]

    @property
    def step(self) -> int:
        return self.contents["global_step"]

    def weights(self, ema: str | float | None = None) -> dict[str, Tensor]:
        """The trained network's parameters, by our names.

        Args:
            ema: a decay that was kept, `none` for the weights as trained, None for the average the run sampled with.
        """
        prefix = "network."
        state = {k.removeprefix(prefix): v for k, v in self.contents["state_dict"].items() if k.startswith(prefix)}
        decay = self.average(ema)
        return state if decay == "none" else state | self.contents["ema"][decay]

    def average(self, ema: str | float | None = None) -> str:
        """The decay of which `weights` takes the average, or `none`.

        Raises:
            UserError: one that was not kept.
        """
        averages = self.contents.get("ema") or {}
        decay = str(self.contents.get("ema_use") if ema is None else ema)
        if decay == "none" or (ema is None and not averages):
            return "none"
        if decay not in averages:
            raise UserError(f"ema={decay} is not in {self.path}; it holds {', '.join(averages) or 'none'}")
        return decay


def is_checkpoint(path: Path) -> bool:
    """Whether something is there that may be one: a file, or the folder of a sharded one."""
    return path.is_file() or is_sharded_checkpoint(path)


def find_checkpoint(path: str | Path, *, key: str = "ckpt") -> Path:
    """A checkpoint, or the one to take of a run folder: `best` where there is one, else `last`.

    Raises:
        UserError: neither is there; the line names `key`.
    """
    path = Path(path).expanduser()
    for place in (path, path / "checkpoints" / "best.ckpt", path / "checkpoints" / "last.ckpt"):
        if is_checkpoint(place):
            return place
    what = f"no checkpoint in run folder {path}" if path.is_dir() else f"no such checkpoint or run folder: {path}"
    raise UserError(f"{key}: {what}; train one first, e.g. python -m grn.train +experiment=digits_c2i")


def read_checkpoint(path: str | Path, *, key: str = "ckpt", weights: bool = True) -> Checkpoint:
    """Reads one of our checkpoints onto the CPU; nothing in the file is executed.

    Args:
        weights: False for what wants to know the config alone: tensors are left out, or mapped from a single file.

    Raises:
        UserError: missing, damaged, or not a checkpoint of ours.
    """
    path = find_checkpoint(path, key=key)
    skip = ("optimizer_states", *(() if weights else ("state_dict", "ema")))
    contents = read_either(path, f"{key}: {path} cannot be read as a checkpoint", mmap=not weights, skip=skip)
    known = isinstance(contents, dict) and {"config", "global_step"} <= contents.keys()
    if is_official_class_refiner(contents):
        raise UserError(
            f"{key}: {path} is one of the authors' refiners: make it ours first, python -m grn.export ckpt={path} "
            "model=class_refiner_B tokenizer=official_image tokenizer.ckpt=HBQ_image_tokenizer_16dim_M4.ckpt, and give "
            "the folder that this writes"
        )
    if not known or not isinstance(contents["config"], dict):
        raise UserError(
            f"{key}: {path} is not a checkpoint of GRN; with one of the authors' tokenizers give "
            "tokenizer=official_image or tokenizer=official_joint, too"
        )
    parts = ("model", "text_encoder", "training", "data", "sampler", "scores")
    built = [contents["config"].get(part) for part in parts] + [(contents.get("tokenizer") or {}).get("model")]
    check_targets(built, f"{key}: {path} is not to be trusted")
    config = OmegaConf.create(contents["config"])
    if OmegaConf.select(config, "training._target_") not in KINDS:
        raise UserError(f"{key}: {path} was trained by something unknown here")
    return Checkpoint(path, config, contents)


def build_network(model: DictConfig) -> nn.Module:
    """The network of a `model` config, without weights."""
    return instantiate({k: v for k, v in model.items() if k != "weights"})


def load_tokenizer(
    path: str | Path | Checkpoint,
    *,
    embed: bool = True,
    official: DictConfig | dict[str, Any] | None = None,
    ema: str | float | None = None,
    key: str = "tokenizer.ckpt",
) -> tuple[HBQTokenizer, dict[str, Any]]:
    """A trained tokenizer and the record of it that goes into a refiner's checkpoints.

    The record's `sha256` depends on the weights alone, not on which kind of file they come from.

    Args:
        path: a run folder or checkpoint file of ours; an exported folder (`grn.export`), or one on the Hugging Face
            Hub as `hf://owner/name`; an official file; or a checkpoint that was read already.
        embed: whether the record holds the weights, or only path and hash.
        official: the `model` config of an official file; None for what knows its own.
        ema: of a checkpoint of ours, as in `Checkpoint.weights`.
        key: the config key that errors name.

    Raises:
        UserError: nothing of that kind is there, or it is of something else.
    """
    checkpoint, step = None, None
    if isinstance(path, Checkpoint):
        checkpoint, path = path, path.path
    path = Path(path).expanduser() if Path(path).expanduser().exists() else path
    if ema is not None and (official is not None or is_pretrained(path)):
        raise UserError(f"ema={ema}: {path} holds one set of weights; leave ema out")
    if official is not None:
        model = OmegaConf.to_container(OmegaConf.create(official), resolve=True)
        tokenizer = build_network(model)
        load_strict(tokenizer, load_official_tokenizer(path), source=str(path))
    elif is_pretrained(path):
        tokenizer, model, step = _load_exported(path, key=key)
    else:
        checkpoint = checkpoint or read_checkpoint(path, key=key)
        if checkpoint.kind != "tokenizer":
            raise UserError(
                f"{key}: {checkpoint.path} is a {checkpoint.kind}, not a tokenizer; only tokenizers serve here"
            )
        path, step = checkpoint.path, checkpoint.step
        model = OmegaConf.to_container(checkpoint.config.model, resolve=True)
        tokenizer = build_network(model)
        load_strict(tokenizer, checkpoint.weights(ema), source=str(path))
    state = tokenizer.state_dict()
    record = {
        "model": model,
        "official": official is not None,
        "path": str(path.resolve() if isinstance(path, Path) else path),
        "ema": ema,
        "step": step,
        "sha256": weights_hash(state),
        "state_dict": state if embed else None,
    }
    return tokenizer, record


def _load_exported(path: str | Path, *, key: str) -> tuple[HBQTokenizer, dict[str, Any], int | None]:
    """(The tokenizer of an exported folder or Hub id, its `model` config, the step of its training if known)."""
    try:
        folder = fetch(path)
        tokenizer = HBQTokenizer.from_pretrained(folder)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    model = {"_target_": f"{HBQTokenizer.__module__}.{HBQTokenizer.__qualname__}"} | tokenizer.config
    step = read_config(folder)["_provenance"].get("step")
    return tokenizer, model, step if isinstance(step, int) else None


def restore_tokenizer(record: dict[str, Any]) -> HBQTokenizer:
    """The tokenizer of a refiner's checkpoint, from its embedded weights or from where it came from.

    Raises:
        UserError: the file it came from is gone or has other weights now.
    """
    model = OmegaConf.create(record["model"])
    if record["state_dict"] is None:
        official = model if record["official"] else None
        tokenizer, found = load_tokenizer(record["path"], embed=False, official=official, ema=record.get("ema"))
        if found["sha256"] != record["sha256"]:
            raise UserError(
                f"the tokenizer {record['path']} is not the one this refiner was trained with (its weights changed); "
                "put the old file back"
            )
        return tokenizer
    tokenizer = build_network(model)
    load_strict(tokenizer, record["state_dict"], source="the embedded tokenizer")
    return tokenizer


def weights_hash(state: dict[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
