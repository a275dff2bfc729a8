"""Atomic writes, and digests of files."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from grn.runtime.errors import UserError

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, or its user's share of it


def no_space(path: str | Path) -> str:
    """What to say where an `OSError` of `FULL` is about `path`."""
    return f"{path}: no space is left on its disk; free some and run again, or choose another folder"


# What the path of a run or of results itself can cause, before or while it is written.
UNWRITABLE = (errno.ENAMETOOLONG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
UNWRITABLE += (errno.ENOENT, errno.ELOOP, errno.EIO, errno.ESTALE)  # a folder that somebody removed, a mount that broke


def unwritable(error: OSError) -> str:
    """What to say of an `OSError` of `UNWRITABLE`."""
    path = str(error.filename)
    path = path if len(path) <= 300 else f"{path[:300]}..."
    return f"{path} cannot be written ({error.strerror}): choose another name or folder"


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` for what is to be renamed to it; gone afterwards, or, of a killed process, to be removed
    by `remove_leftovers`."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=temporary_prefix(path)) as folder:
        yield Path(folder)


def temporary_prefix(path: Path) -> str:
    """How the names of temporary files and folders beside `path` begin."""
    return f".{path.name[:100]}.writing-"


def remove_leftovers(folder: Path, *, of: str | None = None) -> None:
    """Removes what killed processes were writing in `folder`, where no other process writes now.

    Args:
        of: only what was to become the file or folder of this name; None: all but what has a lock of its own.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if not (found := re.fullmatch(r"\.(.+)\.writing-[a-z0-9_]{8}", path.name)):
            continue
        if (found[1] == of[:100]) if of is not None else not (folder / f".{found[1]}.lock").exists():
            log.info("removing %s, which a process that was killed has left", path)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Lets `write` fill a temporary file beside `path` (its folder is made), then renames it to `path`.

    Raises:
        UserError: the disk is full; what was at `path` is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # mkstemp would make the file private to its owner; files on a cluster are shared.
        with temporary_folder(path) as folder:
            temporary = folder / path.name
            try:
                write(temporary)
            except (OSError, UserError):
                raise
            except Exception as error:  # torch.save's and safetensors' own writers do not say why
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
    """Lets `write` fill a temporary folder beside `path`, then renames it to `path`; what was there is replaced.

    Where `path` is a link to a folder, that folder is the one that is written; the link stays. Returns `path`.
    """
    given, path = path, Path(os.path.realpath(path))

    def fill(temporary: Path) -> None:
        temporary.mkdir()
        write(temporary)
        if path.is_dir():
            os.replace(path, temporary.with_name("earlier"))  # goes with the temporary files

    write_atomically(path, fill)
    return given


def write_text(path: Path, text: str) -> Path:
    """Writes UTF-8 text atomically."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: object) -> Path:
    """Writes indented JSON atomically."""
    return write_text(path, json.dumps(content, indent=2) + "\n")


class Unreadable(ValueError):
    """A file that is no plain file, is too large, or cannot be read; the line says so."""


def read_bounded(path: Path, most: int, *, follow: bool = True) -> bytes:
    """A file of at most `most` bytes, which no process can have us wait for.

    Args:
        follow: whether it may be a link.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: anything else.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(f"{path} cannot be read ({error.strerror})") from None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Unreadable(f"{path} is no file")
        data = file.read(most + 1)
    if len(data) > most:
        raise Unreadable(f"{path} has more than {most} bytes")
    return data


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
