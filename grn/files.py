"""Files are written whole or not at all; and told by their digest."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from grn.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, or its user's share of it


def no_space(path: str | Path) -> str:
    """What to say where an `OSError` of `FULL` is about `path`."""
    return f"{path}: no space is left on its disk; free some and run again, or choose another folder"


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Lets `write` fill a temporary file beside `path` (its folder is made), then renames it to `path`.

    Raises:
        UserError: the disk is full; what was at `path` is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # mkstemp would make the file private to its owner; files on a cluster are shared.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary = Path(folder) / path.name
            try:
                write(temporary)
            except RuntimeError as error:  # torch.save's own writer does not say why
                if shutil.disk_usage(folder).free < 2**20:
                    raise OSError(errno.ENOSPC, "no space") from error
                raise
            os.replace(temporary, path)
    except OSError as error:
        if error.errno in FULL:
            raise UserError(no_space(path)) from error
        raise
    return path


def write_folder(path: Path, write: Callable[[Path], object]) -> Path:
    """Lets `write` fill a temporary folder beside `path`, then renames it to `path`; what was there is replaced."""

    def fill(temporary: Path) -> None:
        temporary.mkdir()
        write(temporary)
        if path.is_dir():
            os.replace(path, temporary.with_name("earlier"))  # goes with the temporary files

    return write_atomically(path, fill)


def write_text(path: Path, text: str) -> Path:
    """Writes UTF-8 text atomically."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: object) -> Path:
    """Writes indented JSON atomically."""
    return write_text(path, json.dumps(content, indent=2) + "\n")


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
