"""Reads checkpoint files that may come from anywhere: nothing in them is executed."""

import importlib
import inspect
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from grn.errors import UserError


def read_untrusted(path: Path, complaint: str, *, mmap: bool = False) -> Any:
    """What `torch.save` wrote, on the CPU.

    Args:
        complaint: the error's words before the reason, e.g. "ckpt: x.ckpt cannot be read as a checkpoint".
        mmap: map the tensors instead of reading them; for files that nobody overwrites meanwhile.

    Raises:
        UserError: damaged, foreign or hostile; `complaint` and the reason, in one line.
    """
    try:
        # Only the zip format can be mapped; PyTorch before 1.6 wrote another.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as error:  # torch raises half a dozen kinds for damaged, foreign and hostile files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{complaint} ({reason})") from None


def read_official(path: str | Path, *, key: str) -> tuple[Path, Any]:
    """(Its path, the contents) of one of the authors' files, on the CPU and mapped.

    Args:
        key: the config key that errors name.

    Raises:
        UserError: missing, or as in `read_untrusted`.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{key}: no file {path}")
    return path, read_untrusted(path, f"{key}: {path} cannot be read as a checkpoint", mmap=True)


def is_state(contents: Any) -> bool:
    """Whether that, out of a file, is a flat state dict of weights."""
    return isinstance(contents, dict) and all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.layout is torch.strided
        for name, tensor in contents.items()
    )


def check_targets(config: Any, complaint: str) -> None:
    """Sees to it that Hydra, which calls whatever a config's `_target_` names, will build nothing but parts of GRN.

    Args:
        config: plain containers out of a file.
        complaint: the error's words before the reason.

    Raises:
        UserError: a target is no class of GRN (or function, with `_partial_`), nor of a package that the environment
            variable GRN_TRUST names; or something refers to what is not in `config` (`${...}`).
    """
    for node in _nodes(config):
        if isinstance(node, str) and "${" in node:  # configs are saved resolved
            raise UserError(f"{complaint}: it refers to another place by {node[:100]!r}")
        if not isinstance(node, Mapping) or "_target_" not in node:
            continue
        target, partial = str(node["_target_"]), node.get("_partial_") is True
        if target.split(".")[0] not in trusted() and not _is_ours(target, partial):
            raise UserError(
                f"{complaint}: it wants to call {target[:100]}, which is no part of GRN; if you trust the file, set "
                f"GRN_TRUST={target[:100].split('.')[0]}"
            )


def trusted() -> set[str]:
    """What the environment variable GRN_TRUST names, by commas: packages, and schemes of urls such as `pipe`."""
    return set(filter(None, os.environ.get("GRN_TRUST", "").split(",")))


def _nodes(node: Any) -> Iterator[Any]:
    """The node and all that is in it; OmegaConf makes lists of tuples, too."""
    yield node
    for child in node.values() if isinstance(node, Mapping) else node if isinstance(node, (list, tuple)) else ():
        yield from _nodes(child)


def _is_ours(target: str, partial: bool) -> bool:
    module, _, name = target.rpartition(".")
    if module.split(".")[0] != "grn":
        return False
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return False
    if not (inspect.isclass(found) or (partial and inspect.isfunction(found))):
        return False
    if found.__module__.startswith("grn.data."):  # what reads shards by itself would run the commands in their urls
        return inspect.isclass(found) and issubclass(found, LightningDataModule)
    return found.__module__.startswith("grn.")
