"""Our own checkpoints: Lightning files that know their config, their averages and their tokenizer.

A file holds what Lightning puts there (`state_dict`, optimiser, loops, data position) and beside it

- `config`: the resolved config of the run, plain containers;
- `ema`: decay -> parameter name -> float32 tensor; `ema_use`: the decay to sample with;
- `tokenizer` (refiners): `{"model": its config, "official", "path", "sha256", "state_dict" or None}`.
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
from grn.checkpoints.official_tokenizer import load_official_tokenizer
from grn.checkpoints.reading import read_untrusted
from grn.errors import UserError
from grn.networks.tokenizer import HBQTokenizer

KINDS = {
    "grn.training.RefinerModule": "refiner",
    "grn.training.TokenizerModule": "tokenizer",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file as read: `path` (a file), `config` and the raw `contents`."""

    path: Path
    config: DictConfig
    contents: dict[str, Any]

    @property
    def kind(self) -> str:
        """`refiner` or `tokenizer`."""
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
        averages = self.contents.get("ema") or {}
        decay = str(self.contents.get("ema_use") if ema is None else ema)
        if decay == "none" or (ema is None and not averages):
            return state
        if decay not in averages:
            raise UserError(f"ema={decay} is not in {self.path}; it holds {', '.join(averages) or 'none'}")
        return state | averages[decay]


def find_checkpoint(path: str | Path, *, key: str = "ckpt") -> Path:
    """A checkpoint file, or the one to take of a run folder: `best` where there is one, else `last`.

    Raises:
        UserError: neither is there; the line names `key`.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    for name in ("best.ckpt", "last.ckpt"):
        if (path / "checkpoints" / name).is_file():
            return path / "checkpoints" / name
    what = f"no checkpoint in run folder {path}" if path.is_dir() else f"no such checkpoint or run folder: {path}"
    raise UserError(f"{key}: {what}; train one first, e.g. python -m grn.train +experiment=digits_c2i")


def read_checkpoint(path: str | Path, *, key: str = "ckpt") -> Checkpoint:
    """Reads one of our checkpoints onto the CPU; nothing in the file is executed.

    Raises:
        UserError: missing, damaged, or not a checkpoint of ours.
    """
    path = find_checkpoint(path, key=key)
    contents = read_untrusted(path, f"{key}: {path} cannot be read as a checkpoint")
    if not isinstance(contents, dict) or not {"state_dict", "config", "global_step"} <= contents.keys():
        raise UserError(f"{key}: {path} is not a checkpoint of GRN (official files are given as model.weights)")
    config = OmegaConf.create(contents["config"])
    if OmegaConf.select(config, "training._target_") not in KINDS:
        raise UserError(f"{key}: {path} was trained by something unknown here")
    return Checkpoint(path, config, contents)


def build_network(model: DictConfig) -> nn.Module:
    """The network of a `model` config, without weights."""
    return instantiate({k: v for k, v in model.items() if k != "weights"})


def load_tokenizer(
    path: str | Path, *, embed: bool = True, official: DictConfig | None = None
) -> tuple[HBQTokenizer, dict[str, Any]]:
    """A trained tokenizer and the record of it that goes into a refiner's checkpoints.

    Args:
        path: a run folder or checkpoint file of ours, whose averaged weights are taken; or an official file.
        embed: whether the record holds the weights, or only path and hash.
        official: the `model` config of an official file; None for checkpoints of ours, which know theirs.
    """
    if official is None:
        checkpoint = read_checkpoint(path, key="tokenizer.ckpt")
        if checkpoint.kind != "tokenizer":
            raise UserError(f"tokenizer.ckpt: {checkpoint.path} is a {checkpoint.kind}, not a tokenizer")
        path, model, weights = checkpoint.path, checkpoint.config.model, checkpoint.weights()
    else:
        path, model, weights = Path(path), official, load_official_tokenizer(path)
    tokenizer = build_network(model)
    load_strict(tokenizer, weights, source=str(path))
    record = {
        "model": OmegaConf.to_container(model, resolve=True),
        "official": official is not None,
        "path": str(path.resolve()),
        "sha256": weights_hash(weights),
        "state_dict": weights if embed else None,
    }
    return tokenizer, record


def restore_tokenizer(record: dict[str, Any]) -> HBQTokenizer:
    """The tokenizer of a refiner's checkpoint, from its embedded weights or from where it came from.

    Raises:
        UserError: the file it came from is gone or has other weights now.
    """
    model = OmegaConf.create(record["model"])
    if record["state_dict"] is None:
        official = model if record["official"] else None
        tokenizer, found = load_tokenizer(record["path"], embed=False, official=official)
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
