"""The kind of checkpoint at a path, by file names alone, without torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grn.runtime.errors import UserError

HUB = "hf://"  # a repository on the Hugging Face Hub: hf://owner/name
CONFIG, WEIGHTS = "config.json", "model.safetensors"  # an exported network (grn.weights.pretrained)
INDEX = "model_index.json"  # an exported refiner (grn.checkpoints.exported)
CARD, PICTURE = "README.md", "samples.png"  # what an export may hold beside: its card, and what that shows
TEXT_REFINER = "grn.networks.text_refiner.TextRefiner"
REST = "rest.pt"  # a sharded checkpoint (grn.checkpoints.sharded)
KINDS = {  # what a run trains, by `training._target_` of its config
    "grn.training.RefinerModule": "refiner",
    "grn.training.TextRefinerModule": "text refiner",
    "grn.training.TokenizerModule": "tokenizer",
}


def kind_of(config: Any) -> str | None:
    """What a run trains, by its config: `refiner` (of classes), `text refiner` or `tokenizer`; None: it does not tell.

    Of a module of somebody's own package, the networks tell.
    """
    parts = config if isinstance(config, Mapping) else {}
    model, training, tokenizer = (
        part if isinstance(part := parts.get(name), Mapping) else {} for name in ("model", "training", "tokenizer")
    )
    target = training.get("_target_")
    if not isinstance(target, str) or target.startswith("grn."):
        return KINDS.get(target) if isinstance(target, str) else None
    if tokenizer.get("ckpt") is None:
        return "tokenizer"
    return "text refiner" if model.get("_target_") == TEXT_REFINER else "refiner"


def is_pretrained(path_or_hub_id: str | Path) -> bool:
    """Whether it names the folder of an exported network, or plainly (`hf://owner/name`) a repository on the Hub."""
    return str(path_or_hub_id).startswith(HUB) or (Path(path_or_hub_id).expanduser() / CONFIG).is_file()


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether the folder `path` is a checkpoint (and no run folder)."""
    return (Path(path) / REST).is_file()


def is_checkpoint(path: Path) -> bool:
    """Whether something is there that may be one: a file, or the folder of a sharded one."""
    return path.is_file() or is_sharded_checkpoint(path)


def checkpoints_at(path: str | Path, *, key: str) -> list[Path]:
    """The checkpoint itself; or of a run folder, `last` before `best`, those that are there: at least one.

    Raises:
        UserError: there is none, or a link to one that is not there; the line names `key`.
    """
    path = Path(path).expanduser()
    if is_checkpoint(path):
        return [path]
    places = [path / "checkpoints" / f"{name}.ckpt" for name in ("last", "best")]
    for place in (path, *places):
        if place.is_symlink() and not place.exists():
            raise UserError(
                f"{key}: {place} is a link to {place.readlink()}, which is not there: put it back, or give the file of "
                "a checkpoint"
            )
    if there := [place for place in places if is_checkpoint(place)]:
        return there
    what = f"no checkpoint in run folder {path}" if path.is_dir() else f"no such checkpoint or run folder: {path}"
    experiment = "digits_tokenizer" if key.startswith("tokenizer") or "tokenizer" in path.name else "digits_c2i"
    raise UserError(f"{key}: {what}; train it first, e.g. python -m grn.train +experiment={experiment}")
