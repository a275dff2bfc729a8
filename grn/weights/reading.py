"""Reads checkpoint files that may come from anywhere: nothing in them is executed."""

import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from grn.runtime.errors import UserError
from grn.weights.integrity import check_archive

# Of plain containers in a file. The largest of ours, of text refiners with hundreds of prompts, have a few thousand.
MAX_VALUES, MAX_DEPTH, MAX_TEXT = 100_000, 32, 2**24


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
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            check_archive(path, whole=False)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
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


def check_plain(content: Any, complaint: str) -> None:
    """Checks that containers out of a file can be walked, printed and compared: a pickle or YAML of a few lines may
    stand for more values than any memory holds, and may contain itself.

    Args:
        content: mappings, lists and tuples of texts, numbers, booleans and None.
        complaint: the error's words before the reason.

    Raises:
        UserError: more than `MAX_VALUES` values, those of a shared part counted each time; deeper than `MAX_DEPTH`;
            more than `MAX_TEXT` characters; another kind of value; a number that is not finite or has more than 64
            bits; or a reference to another place (`${...}`), where configs are saved resolved.
    """
    values, characters = 0, 0
    waiting = [(content, 0)]
    while waiting:
        node, depth = waiting.pop()
        values += 1
        if isinstance(node, str):
            characters += len(node)
            if "${" in node:
                raise UserError(f"{complaint}: it has a reference {node[:100]!r}")
        elif isinstance(node, (Mapping, list, tuple)):
            children = [*node.keys(), *node.values()] if isinstance(node, Mapping) else node
            if depth == MAX_DEPTH:
                raise UserError(f"{complaint}: it is more than {MAX_DEPTH} levels deep")
            if values + len(waiting) + len(children) > MAX_VALUES:
                raise UserError(f"{complaint}: it holds more than {MAX_VALUES} values")
            waiting.extend((child, depth + 1) for child in children)
        elif not isinstance(node, (int, float, NoneType)):
            raise UserError(f"{complaint}: it holds a {type(node).__name__}, where texts and numbers are")
        elif isinstance(node, float) and not math.isfinite(node):
            raise UserError(f"{complaint}: it holds {node}, where numbers are finite")
        elif isinstance(node, int) and node.bit_length() > 64:
            raise UserError(f"{complaint}: it holds a whole number of {node.bit_length()} bits")
        if characters > MAX_TEXT:
            raise UserError(f"{complaint}: it holds more than {MAX_TEXT} characters")


def trusted() -> set[str]:
    """What the environment variable GRN_TRUST names, by commas: packages, and schemes of urls such as `pipe`."""
    return set(filter(None, os.environ.get("GRN_TRUST", "").split(",")))
