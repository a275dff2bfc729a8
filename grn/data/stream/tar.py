"""Reads untrusted tar archives sequentially; sizes in headers are checked against the bytes that follow.

`tarfile` would skip or collect whatever size a header claims, for hours where that is more than the archive has, and
parses extended headers in quadratic time. It still tells what a header says.
"""

import bz2
import gzip
import io
import lzma
import os
import selectors
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

MAX_SILENCE = 300  # seconds
MAX_HEADER_BYTES = 2**20  # of a long name or of extended attributes
MAX_MEMBER_BYTES = 2**32  # where the length of the archive is not known
FREE_EXPANSION, MAX_EXPANSION = 2**30, 100  # of a compressed archive: bytes, and beyond them so many times its own
BLOCK, CHUNK = tarfile.BLOCKSIZE, 2**20
ZEROS = bytes(BLOCK)
DECOMPRESSORS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


class ByteStream(Protocol):
    """What archives are read from."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class TarReader:
    """The regular files of an archive: iterates over (name, bytes that it has); `read` gives the current one's content.

    Plain, gzip, bzip2 or xz; several archives one after the other, as `cat a.tar b.tar` makes them, are read as one.

    Args:
        stream: the archive, read from its beginning.
        length: its bytes; None where that is not known.
        check: called now and then while it is read; may raise to end that.

    Raises:
        tarfile.ReadError: from iterating or reading: damaged, truncated, or a size that is not there; sparse files.
        OSError: from iterating or reading: `stream` cannot be read.
    """

    def __init__(self, stream: ByteStream, *, length: int | None = None, check: Callable[[], None] = lambda: None):
        self._source = _Source(stream, check)
        self._plain = buffered = io.BufferedReader(self._source, 2**16)
        for magic, decompressor in DECOMPRESSORS.items():
            if buffered.peek(len(magic)).startswith(magic):
                buffered = decompressor(buffered)
                length = None
                break  # what is in it is no compressed file again; to look would read it already
        self._stream, self._length, self._read = buffered, length, 0
        self._content, self._padding = 0, 0  # of the current file: bytes that are still to be read
        self.ended = False  # whether zeros were read last, as an archive ends: what came before is whole

    def __iter__(self) -> Iterator[tuple[str, int]]:
        while True:
            for _ in self._chunks(self._content + self._padding):
                pass
            self._content = self._padding = 0
            place, block = self._read, self._up_to(BLOCK)
            if block == ZEROS:
                self.ended = True
            elif self.ended and not block.strip(b"\0"):  # the last of the zeros may be no whole block
                return
            else:
                try:
                    if len(block) < BLOCK:
                        raise tarfile.ReadError("unexpected end of the archive")
                    header = self._header(block)
                except tarfile.ReadError as error:
                    behind = "behind the end of an archive, " if self.ended else ""
                    raise tarfile.ReadError(f"{behind}at byte {place}: {error}") from None
                self.ended = False
                if header.isreg():
                    yield header.name, header.size

    def read(self) -> bytes:
        """The content of the file that the iterator has given last. Once."""
        content, self._content = self._content, 0
        return b"".join(self._chunks(content))

    def _header(self, block: bytes) -> tarfile.TarInfo:
        """The header of a file, with the extended ones before it."""
        name = size = None
        while True:
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
            except tarfile.HeaderError as error:
                raise tarfile.ReadError(str(error)) from None
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                text = self._extended(header)
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    name = text.partition(b"\0")[0]
            elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                records = _pax_records(self._extended(header))
                if any(keyword.startswith(b"GNU.sparse") for keyword in records):
                    raise tarfile.ReadError("sparse files are not read")
                name, size = records.get(b"path", name), records.get(b"size", size)
            elif header.type == tarfile.XGLTYPE:
                self._extended(header)  # comments; nothing that tells of a file is true of all
            else:
                break
            block = self._exactly(BLOCK)
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("sparse files are not read")
        if name is not None:
            header.name = name.decode("utf-8", "replace")
        if size is not None:
            if not size.isdigit() or len(size) > 20:
                raise tarfile.ReadError("a size that is no number")
            header.size = int(size)
        if header.isreg() or header.type not in tarfile.SUPPORTED_TYPES:  # links and folders have none, if they say so
            self._claim(header.size)
        return header

    def _extended(self, header: tarfile.TarInfo) -> bytes:
        if header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {header.size} bytes, more than {MAX_HEADER_BYTES}")
        self._claim(header.size)
        content = self._exactly(self._content + self._padding)[: self._content]
        self._content = self._padding = 0
        return content

    def _claim(self, size: int) -> None:
        most = MAX_MEMBER_BYTES if self._length is None else self._length - self._read
        if not 0 <= size <= most:
            there = "it may have at most" if self._length is None else "the archive has only"
            raise tarfile.ReadError(f"a header claims {size} bytes, {there} {most}")
        self._content, self._padding = size, -size % BLOCK

    def _exactly(self, size: int) -> bytes:
        return b"".join(self._chunks(size))

    def _chunks(self, size: int) -> Iterator[bytes]:
        while size > 0:
            chunk = self._up_to(min(size, CHUNK))
            if not chunk:
                raise tarfile.ReadError("unexpected end of the archive")
            size -= len(chunk)
            yield chunk

    def _up_to(self, size: int) -> bytes:
        """Fewer only at the end."""
        try:
            data = self._stream.read(size)
        except MemoryError:
            raise
        except Exception as error:  # what decompressors raise has no common base
            if self._stream is self._plain or error is self._source.error:
                raise
            raise tarfile.ReadError(f"invalid compressed data ({error})") from None
        self._read += len(data)
        if self._stream is not self._plain and self._read > max(
            FREE_EXPANSION, MAX_EXPANSION * self._source.read_bytes
        ):
            raise tarfile.ReadError(f"compressed data that expand to more than {MAX_EXPANSION} times their size")
        return data


class _Source(io.RawIOBase):
    """Whatever has `read`, for `io.BufferedReader`; remembers its own error, to tell it from decompressors'.

    Of a command's output (webdataset's `Pipe`) no more than `MAX_SILENCE` seconds without a byte are waited for.
    """

    def __init__(self, stream: ByteStream, check: Callable[[], None]):
        self.stream, self.check = stream, check
        self.pipe: BinaryIO | None = getattr(getattr(stream, "proc", None), "stdout", None)
        self.read_bytes = 0
        self.error: BaseException | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        try:
            self.check()
            data = self.stream.read(len(buffer)) if self.pipe is None else self._from_pipe(self.pipe, len(buffer))
        except BaseException as error:
            self.error = error
            raise
        buffer[: len(data)] = data
        self.read_bytes += len(data)
        return len(data)

    def _from_pipe(self, pipe: BinaryIO, size: int) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            for _ in range(MAX_SILENCE):
                if selector.select(timeout=1):
                    # Nobody else reads it, so that nothing waits in the buffer that `stream` has. It knows the status.
                    return os.read(pipe.fileno(), size) or self.stream.read(size)
                self.check()
        raise TimeoutError(f"no byte came in {MAX_SILENCE} seconds")


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Keyword -> value out of "LENGTH KEYWORD=VALUE\\n" records, of which LENGTH counts all bytes."""
    records, place = {}, 0
    while place < len(data) and data[place]:  # some writers fill up with zeros
        space = data.find(b" ", place, place + 10)
        length = data[place:space]
        if space < 0 or not length.isdigit():
            raise tarfile.ReadError("damaged extended header")
        end = place + int(length)
        keyword, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals or end > len(data) or data[end - 1 : end] != b"\n":
            raise tarfile.ReadError("damaged extended header")
        records[keyword] = value
        place = end
    return records
