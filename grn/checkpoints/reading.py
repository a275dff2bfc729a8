"""Reads checkpoint files that may come from anywhere: nothing in them is executed."""

import zipfile
from pathlib import Path
from typing import Any

import torch

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
