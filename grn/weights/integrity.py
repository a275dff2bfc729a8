"""Checksums of checkpoints, and the two generations of `last.ckpt`.

`torch.save` writes a zip archive with a CRC-32 of each tensor, which `torch.load` does not look at. The shards of a
folder are such archives, one after the other, and `rest.pt` has the SHA-256 of their index.
"""

import contextlib
import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

from grn.runtime.files import temporary_folder
from grn.weights.kinds import is_checkpoint

log = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class Damaged(Exception):
    """Why, in a few words."""


def check_archive(file: Path | io.IOBase, *, whole: bool) -> None:
    """Raises:
    Damaged: no zip archive as `torch.save` writes it: something is compressed, so that it may unpack to any size, or
        overlaps; or, of a `whole` one, a checksum is another one.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise Damaged("a part of it is compressed, which torch.save never does")
            if archive.fp is None or sum(entry.file_size for entry in entries) > archive.fp.seek(0, os.SEEK_END):
                raise Damaged("it holds less than its directory says")
            if whole and (odd := archive.testzip()) is not None:
                raise Damaged(f"{odd} has another checksum")
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise Damaged(str(error).strip() or type(error).__name__) from None


def check_slices(file: Path, slices: Iterable[tuple[int, int]]) -> None:
    """Of archives at (offset, length) of a file.

    Raises:
        Damaged: as in `check_archive`, of one of them.
    """
    try:
        stream = open(file, "rb")  # noqa: SIM115, closed below
    except OSError as error:
        raise Damaged(f"{file.name}: {error.strerror}") from None
    with stream:
        for offset, length in slices:
            try:
                check_archive(_Slice(stream, offset, length), whole=True)
            except Damaged as damage:
                raise Damaged(f"{file.name} at {offset}: {damage}") from None


def digest(file: Path) -> str:
    """SHA-256 of a small file, in hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


class _Slice(io.RawIOBase):
    """A part of a file as a file; nothing is copied."""

    def __init__(self, stream: io.BufferedReader, offset: int, length: int):
        self.stream, self.offset, self.length, self.position = stream, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = max(0, start + offset)
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.position)
        self.stream.seek(self.offset + self.position)
        content = self.stream.read(left if size is None or size < 0 else min(size, left))
        self.position += len(content)
        return content


# --- generations ------------------------------------------------------------------------------------------------------


def keep_previous(path: Path, *, without: str | None = None) -> None:
    """Keeps the `last.ckpt` that is about to be replaced as `previous.ckpt`; there is a `last.ckpt` all the time.

    By hard links, which take no space and no time; a file system that has none keeps one generation, which is told.
    Checkpoints of other names, and what is not there, are passed over.

    Args:
        path: of the checkpoint, a file or a folder of shards.
        without: a subfolder that belongs to its successor.
    """
    if path.name != LAST or not is_checkpoint(path):
        return
    previous = path.with_name(PREVIOUS)
    with temporary_folder(path) as scratch:
        kept = Path(scratch, "kept")
        try:
            if path.is_file():
                os.link(path, kept)
            else:
                for file in path.rglob("*"):
                    inside = file.relative_to(path)
                    if file.is_file() and inside.parts[0] != without:
                        (kept / inside).parent.mkdir(parents=True, exist_ok=True)
                        os.link(file, kept / inside)
                kept.chmod(path.stat().st_mode)
        except OSError as error:
            log.warning("%s: the one before it is not kept (%s)", path, error.strerror)
            return
        with contextlib.suppress(FileNotFoundError):
            os.replace(previous, Path(scratch, "older"))  # it may be a folder, which nothing can replace
        os.replace(kept, previous)


def others_beside(path: Path, *, key: str) -> str:
    """What to go on from instead of a checkpoint that is damaged, as the end of a line."""
    named = {name: path.with_name(f"{name}.ckpt") for name in ("previous", "best", "last")}
    found = [name for name, place in named.items() if place != path and is_checkpoint(place)]
    milestones = sorted(path.parent.glob("step_*.ckpt"), reverse=True)
    found += [str(place) for place in milestones[:1] if place != path and is_checkpoint(place)]
    if key != "ckpt_path":
        found = [str(named.get(name, name)) for name in found]
    return f"take another one: {' or '.join(f'{key}={it}' for it in found)}" if found else "no other one is beside it"
