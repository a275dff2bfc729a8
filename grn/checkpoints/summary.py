"""What a checkpoint is, in words and numbers; nothing is built of it, and nothing in it is executed."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grn.checkpoints.exported import PARTS, PIPELINE
from grn.checkpoints.native import find_checkpoint, read_checkpoint
from grn.checkpoints.official_class_refiner import is_official_class_refiner
from grn.runtime.errors import UserError
from grn.runtime.tables import show as show_table
from grn.weights.kinds import CONFIG, INDEX, WEIGHTS, is_sharded_checkpoint
from grn.weights.pretrained import read_config, read_marked_json
from grn.weights.reading import read_untrusted

NETWORK = (
    "size",
    "channels",
    "classes",
    "num_labels",
    "depth",
    "width",
    "dim",
    "heads",
    "attention",
    "latent_channels",
)
NETWORK += ("rounds", "temporal")  # of a network's config, what tells networks apart


def summary(path: str | Path) -> dict[str, Any]:
    """What is at a path, as plain values: `what`, `parameters`, and what else such a thing tells of itself.

    Args:
        path: a run folder, a checkpoint, an export, or one of the authors' files.

    Raises:
        UserError: nothing is there, or nothing that this knows.
    """
    path = Path(path).expanduser()
    if (path / INDEX).is_file():
        return _of_exported_refiner(path)
    if (path / CONFIG).is_file():
        return {"what": "exported network", "path": str(path)} | _of_exported_network(path)
    if path.is_file() and (found := _of_official(path)) is not None:
        return found
    return _of_checkpoint(path)


def show(path: str, *, as_json: bool) -> None:
    """Prints `summary` as a table, or as JSON."""
    found = summary(path)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from rich.table import Table

    table = Table(show_header=False, title=str(path))
    for key, value in found.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name}={part}" for name, part in value.items())
        table.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    show_table(table)


def _of_checkpoint(path: Path) -> dict[str, Any]:
    file = find_checkpoint(path, key="ckpt")
    checkpoint = read_checkpoint(file, key="ckpt", weights=False)
    config, contents = checkpoint.config, checkpoint.contents
    state, record = contents.get("state_dict"), contents.get("tokenizer")
    found = {"what": f"checkpoint of a run ({checkpoint.kind})", "path": str(file), "step": checkpoint.step}
    if is_sharded_checkpoint(file):
        found["sharded"] = True
    if isinstance(state, Mapping):
        found["parameters"] = sum(tensor.numel() for tensor in state.values() if isinstance(tensor, Tensor))
    found["network"] = _network(OmegaConf.to_container(config.model, resolve=False))
    found["averages"] = ", ".join(map(str, OmegaConf.select(config, "callbacks.ema.decays") or [])) or "none"
    found["samples_with"] = contents.get("ema_use") or "the weights as trained"
    if isinstance(record, Mapping):
        found["tokenizer"] = {name: record.get(name) for name in ("path", "step", "sha256") if record.get(name)}
        found["tokenizer"]["embedded"] = record.get("state_dict") is not None
    for key in ("data.name", "data.root", "trainer.max_steps", "seed"):
        if (value := OmegaConf.select(config, key, default=None)) is not None:
            found[key] = value
    if checkpoint.kind != "tokenizer" and (sampler := OmegaConf.select(config, "sampler", default=None)) is not None:
        found["sampler"] = _sampler(OmegaConf.to_container(sampler, resolve=False))
    return found


def _of_exported_refiner(folder: Path) -> dict[str, Any]:
    index = read_marked_json(folder / INDEX)
    if index["_class_name"] != PIPELINE:
        raise UserError(f"{folder / INDEX} is of {str(index['_class_name'])[:100]}, not of a {PIPELINE}")
    found: dict[str, Any] = {
        "what": "exported refiner",
        "path": str(folder),
        "written_by": f"grn {index['_grn_version']}",
    }
    for part in PARTS:
        if (folder / part / CONFIG).is_file():
            found[part] = _of_exported_network(folder / part)
    if isinstance(index.get("sampler"), Mapping):
        found["sampler"] = _sampler(index["sampler"])
    for key in ("labeling", "size", "frames"):
        if key in index:
            found[key] = index[key]
    return found


def _of_exported_network(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    found = {"class": config["_class_name"]}
    if (folder / WEIGHTS).is_file():
        try:
            with safe_open(folder / WEIGHTS, "pt") as file:
                slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118, it is no mapping
                found["parameters"] = sum(math.prod(part.get_shape()) for part in slices)
                found["dtype"] = ", ".join(sorted({part.get_dtype() for part in slices}))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / WEIGHTS} cannot be read as safetensors ({str(error)[:100]})") from None
    found |= _network(config)
    return found | {
        str(name): value for name, value in config["_provenance"].items() if name in ("step", "ema", "ckpt")
    }


def _of_official(path: Path) -> dict[str, Any] | None:
    """Of one of the authors' files; None of another."""
    contents = read_untrusted(path, f"ckpt: {path} cannot be read as a checkpoint", mmap=True)
    if not isinstance(contents, dict) or {"config", "global_step"} <= contents.keys():
        return None
    if is_official_class_refiner(contents):
        what, state = "the authors' class refiner", contents["model"]
    elif any(isinstance(contents.get(key), dict) for key in ("ema", "vae")):
        what, state = "the authors' tokenizer", contents.get("ema") or contents["vae"]
    else:
        state = contents["trainer"] if isinstance(contents.get("trainer"), dict) else contents
        nested = [value for value in state.values() if isinstance(value, dict)]
        state = state if any(isinstance(value, Tensor) for value in state.values()) or not nested else nested[0]
        what = "the authors' text refiner"
        if not any(str(name).startswith("block_chunks.") for name in state):
            return None
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    found = {"what": what, "path": str(path), "tensors": len(tensors)}
    found["parameters"] = sum(tensor.numel() for tensor in tensors.values())
    found["dtype"] = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
    return found


def _network(config: Any) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {}
    kind = {"class": str(config["_target_"]).rpartition(".")[2]} if "_target_" in config else {}
    return kind | {name: config[name] for name in NETWORK if config.get(name) is not None}


def _sampler(config: Any) -> dict[str, Any]:
    """A sampler's settings in one level."""
    found = {}
    for name, value in config.items() if isinstance(config, Mapping) else ():
        if isinstance(value, Mapping):
            kind = str(value.get("_target_", value.get("_class_name", ""))).rpartition(".")[2]
            found[str(name)] = (
                f"{kind}({', '.join(f'{k}={v}' for k, v in value.items() if not str(k).startswith('_'))})"
            )
        elif value is not None and not str(name).startswith("_"):
            found[str(name)] = value
    return found
