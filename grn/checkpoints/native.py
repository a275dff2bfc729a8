"""Our own checkpoints: Lightning's, that know their config, their averages and their tokenizer.

Such a file, or folder (grn/checkpoints/sharded.py), holds what Lightning puts there (`state_dict`, optimizer, loops,
data position) and beside it

- `config`: the resolved config of the run, plain containers;
- `ema`: decay -> parameter name -> float32 tensor; `ema_use`: the decay to sample with;
- `tokenizer` (refiners): `{"model": its config, "official", "path", "ema", "step", "sha256", "state_dict" or None}`.
"""

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from grn.checkpoints.official_class_refiner import is_official_class_refiner
from grn.checkpoints.official_tokenizer import load_official_tokenizer
from grn.checkpoints.sharded import read_either, verify
from grn.checkpoints.trust import BUILT, GROUPS, check_group
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.configs import plain
from grn.runtime.errors import UserError
from grn.weights.building import build_with_weights
from grn.weights.kinds import TEXT_REFINER, checkpoints_at, is_pretrained, kind_of
from grn.weights.mapping import load_strict
from grn.weights.pretrained import fetch, local_file, read_config
from grn.weights.reading import check_plain, is_state


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: its `path`, `config` and the raw `contents`."""

    path: Path
    config: DictConfig
    contents: dict[str, Any]

    @property
    def kind(self) -> str:
        """`refiner` (of classes), `text refiner` or `tokenizer`."""
        return kind_of(self.config) or ""

    @property
    def step(self) -> int:
        return self.contents["global_step"]

    def weights(self, ema: str | float | None = None) -> dict[str, Tensor]:
        """The trained network's parameters, by our names.

        Args:
            ema: a decay that was kept, `none` for the weights as trained, None for the average the run sampled with.
        """
        state, decay = _network_state(self.contents), self.average(ema)
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


def find_checkpoint(path: str | Path, *, key: str = "ckpt") -> Path:
    """A checkpoint, or the one that a run folder means, or its only one.

    Of a tokenizer it is `best`, by the metric that is wanted of it; of a refiner `last`, since the lowest `val/loss`
    does not draw the best samples.

    Raises:
        UserError: neither is there; the line names `key`.
    """
    last, *best = checkpoints_at(path, key=key)
    if not best:
        return last
    skip = ("optimizer_states", "state_dict", "ema")
    contents = read_either(last, f"{key}: {last} cannot be read as a checkpoint", mmap=True, skip=skip)
    return best[0] if _kind(contents) == "tokenizer" else last


def _kind(contents: Any) -> str | None:
    """Of an untrusted checkpoint; None of anything else."""
    return kind_of(contents.get("config")) if isinstance(contents, dict) else None


def read_checkpoint(path: str | Path, *, key: str = "ckpt", weights: bool = True) -> Checkpoint:
    """Reads one of our checkpoints onto the CPU; nothing in the file is executed.

    Args:
        weights: False for what wants to know the config alone: tensors are left out, or mapped from a single file.

    Raises:
        UserError: missing, damaged, or not a checkpoint of ours.
    """
    path = find_checkpoint(path, key=key)
    if weights and (path.is_dir() or zipfile.is_zipfile(path)):  # PyTorch before 1.6 wrote no checksums
        verify(path, key=key)
    skip = ("optimizer_states", *(() if weights else ("state_dict", "ema")))
    contents = read_either(path, f"{key}: {path} cannot be read as a checkpoint", mmap=not weights, skip=skip)
    if is_official_class_refiner(contents):
        raise UserError(
            f"{key}: {path} is one of the authors' refiners: make it ours first, python -m grn.export ckpt={path} "
            "model=class_refiner_B tokenizer=official_image tokenizer.ckpt=HBQ_image_tokenizer_16dim_M4.ckpt, and give "
            "the folder that this writes"
        )
    known = isinstance(contents, dict) and {"config", "global_step"} <= contents.keys()
    if not known or not isinstance(contents["config"], dict):
        raise UserError(
            f"{key}: {path} is not a checkpoint of GRN; with one of the authors' tokenizers give "
            "tokenizer=official_image or tokenizer=official_joint, too"
        )
    config: dict[str, Any] = contents["config"]
    check_plain(config, f"{key}: {path} is not to be trusted")
    for group in BUILT:
        check_group(group, config.get(group), f"{key}: {path} is not to be trusted")
    if isinstance(model := config.get("model"), dict) and model.get("_target_") == TEXT_REFINER:
        model.setdefault("attention", "one_way")  # of runs from before there was another
    checkpoint = Checkpoint(path, OmegaConf.create(config), contents)
    if kind_of(config) is None:
        raise UserError(f"{key}: {path} was trained by an unknown module")
    _check_contents(contents, f"{key}: {path}", weights=weights)
    return checkpoint


def _check_contents(contents: Mapping[str, Any], complaint: str, *, weights: bool) -> None:
    """What stands beside the config, of a file that may hold anything."""
    model, record = contents["config"].get("model"), contents.get("tokenizer")
    if not isinstance(model, dict) or "_target_" not in model:
        raise UserError(f"{complaint} has no network in its config")
    if type(contents["global_step"]) is not int or contents["global_step"] < 0:
        raise UserError(f"{complaint} is damaged: its global_step is {str(contents['global_step'])[:100]!r}, no step")
    if record is not None:
        _check_record(record, complaint)
    if not weights:
        return
    averages = contents.get("ema") or {}
    states = [("state_dict", contents.get("state_dict"))]
    states += [(f"ema.{decay}", state) for decay, state in averages.items()] if isinstance(averages, dict) else []
    if not isinstance(averages, dict) or not all(isinstance(decay, str) for decay in averages):
        raise UserError(f"{complaint} is damaged: its ema does not hold averages by decay")
    for name, state in states:
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise UserError(f"{complaint} is damaged: its {name[:100]} does not hold named weights")
    for name, state in [("state_dict", _network_state(contents)), *states[1:]]:
        if not is_state(state):
            raise UserError(f"{complaint} is damaged: its {name[:100]} holds something else than weights")


def _check_record(record: Any, complaint: str) -> None:
    """Of a tokenizer, as `load_tokenizer` makes it."""
    if (
        not isinstance(record, dict)
        or not {"model", "official", "path", "step", "sha256", "state_dict"} <= record.keys()
    ):
        raise UserError(f"{complaint} is damaged: its tokenizer's record is not whole")
    check_group("tokenizer.model", record["model"], f"{complaint} is not to be trusted")
    sound = (
        isinstance(record["model"], dict)
        and record["model"].get("_target_") is not None
        and all(isinstance(record[key], str) for key in ("path", "sha256"))
        and isinstance(record["step"], (int, NoneType))
        and isinstance(record.get("ema"), (str, float, int, NoneType))
        and (record["state_dict"] is None or is_state(record["state_dict"]))
    )
    if not sound:
        raise UserError(f"{complaint} is damaged: its tokenizer record is invalid")


def _network_state(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    prefix = "network."
    return {k.removeprefix(prefix): v for k, v in contents["state_dict"].items() if k.startswith(prefix)}


def restore(make: Callable[[], nn.Module], model: Mapping[str, Any], state: dict[str, Tensor], *, source: str) -> Any:
    """A network out of a checkpoint, in float32: `build_with_weights`, but for a class of somebody's own, which is
    trusted and may not know the meta device.

    Args:
        make: makes it, of the config `model`.

    Raises:
        UserError: as in `build_with_weights`.
    """
    if model["_target_"] not in GROUPS["model"].targets:
        network = make()
        load_strict(network, state, source=source)
        return network
    described = f"the config in {source} describes no network"
    return build_with_weights(make, state, source=source, described=described).to(torch.float32)


def build_network(model: Mapping[str, Any]) -> Any:
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
            Hub as `hf://owner/name`; an official file (`local_file`); or a checkpoint that was read already.
        embed: whether the record holds the weights, or only path and hash.
        official: the `model` config of an official file; None for what knows its own.
        ema: of a checkpoint of ours, as in `Checkpoint.weights`.
        key: the config key that errors name.

    Raises:
        UserError: nothing of that kind is there, or it is of something else.
    """
    checkpoint, step = None, None
    tokenizer: HBQTokenizer
    if isinstance(path, Checkpoint):
        checkpoint, path = path, path.path
    path = Path(path).expanduser() if Path(path).expanduser().exists() else path
    if ema is not None and (official is not None or is_pretrained(path)):
        raise UserError(f"ema={ema}: {path} holds one set of weights; leave ema out")
    if official is not None:
        model = plain(OmegaConf.create(official), resolve=True)
        tokenizer = build_network(model)
        load_strict(tokenizer, load_official_tokenizer(local_file(path)), source=str(path))
    elif is_pretrained(path):
        tokenizer, model, step = _load_exported(path, key=key)
    else:
        checkpoint = checkpoint or read_checkpoint(path, key=key)
        if checkpoint.kind != "tokenizer":
            raise UserError(
                f"{key}: {checkpoint.path} is a {checkpoint.kind}, not a tokenizer; only tokenizers serve here"
            )
        path, step = checkpoint.path, checkpoint.step
        model = plain(checkpoint.config.model, resolve=True)
        tokenizer = restore(lambda: build_network(model), model, checkpoint.weights(ema), source=str(path))
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
    model: Any = OmegaConf.create(record["model"])
    if record["state_dict"] is None:
        official = model if record["official"] else None
        tokenizer, found = load_tokenizer(record["path"], embed=False, official=official, ema=record.get("ema"))
        if found["sha256"] != record["sha256"]:
            raise UserError(
                f"the tokenizer {record['path']} is not the one this refiner was trained with (its weights changed); "
                "put the old file back"
            )
        return tokenizer
    return restore(lambda: build_network(model), model, record["state_dict"], source="the embedded tokenizer")


def weights_hash(state: dict[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
