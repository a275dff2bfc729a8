"""Remote shards, read by fsspec, with retries."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

import fsspec
from fsspec.registry import known_implementations

from grn.runtime.errors import UserError

ATTEMPTS = 4
MAX_FAULTS = 32  # of a shard, each of which a further attempt has overcome
PAUSE = 1.0  # seconds before the second attempt, twice as many before each further one
BLOCK_BYTES = 8 * 2**20  # that stores are asked for at once
TIMEOUT = {"total": None, "connect": 30, "sock_connect": 30, "sock_read": 60}  # seconds, of http(s)
HTTP = ("http", "https")
PASSING = (408, 425, 429)  # answers of the kind "your fault" that may be another one later
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError, TypeError, ValueError)


class Unreachable(OSError):
    """A shard that cannot be reached or read to its end, after a few attempts; says why in a line."""


def check_scheme(url: str, *, key: str) -> None:
    """Whether shards are read from there at all.

    Args:
        url: `SCHEME://...`, or `pipe:COMMAND`.
        key: the config key it comes from, for messages.

    Raises:
        UserError: an unknown scheme, or a package that it needs is not installed.
    """
    if url.startswith("pipe:"):
        return
    scheme = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(scheme)
        remedy = f"pip install {package}" if package else str(known_implementations[scheme].get("err", "install it"))
        raise UserError(f"{key}: {scheme}:// needs a package that is not installed: {remedy} ({url[:100]})") from None
    except ValueError:
        raise UserError(
            f"{key}: shards are not read from {scheme}:// ({url[:100]}): give paths, http(s)://, s3://, gs://, hf://, "
            "another scheme of fsspec's, or pipe:COMMAND"
        ) from None


class RemoteFile:
    """The bytes of a url from its beginning, as `read` asks for them.

    Args:
        url: of a scheme that `check_scheme` knows.
        check: called while waiting; may raise to end that.

    Raises:
        Unreachable: from `read`.
    """

    def __init__(self, url: str, *, check: Callable[[], None] = lambda: None):
        self.url, self.check = url, check
        self._file: BinaryIO | None = None
        self._place, self._faults = 0, 0

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end alone."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                if self._file is None:
                    self._file = self._open()
                data = self._file.read(size)
                self._place += len(data)
                return data
            except Exception as error:  # what fsspec's implementations raise has no common base
                self.close()
                self._faults += 1
                if attempt == ATTEMPTS or self._faults > MAX_FAULTS or not may_pass(error):
                    raise Unreachable(described(error, self.url)) from None
            self._wait(PAUSE * 2 ** (attempt - 1))
        raise AssertionError

    def close(self) -> None:
        if self._file is not None:
            with suppress(Exception):
                self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        """At the place that the last attempt came to."""
        scheme = self.url.partition("://")[0]
        if scheme not in HTTP:
            file = fsspec.filesystem(scheme).open(self.url, "rb", block_size=BLOCK_BYTES)
            file.seek(self._place)
            return file
        headers = {"headers": {"Range": f"bytes={self._place}-"}} if self._place else {}
        # As a stream (a block of 0 bytes), whose size need not be asked for: many servers know no ranges.
        file = _http(self.url).open(self.url, block_size=0, size=1, **headers)
        again = 0 if file.r.status == 206 else self._place  # bytes that come a second time
        while again > 0:
            if not (data := file.read(min(again, BLOCK_BYTES))):
                raise ConnectionError("the file has become shorter")
            again -= len(data)
        return file

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(0.2, left))


def check_reachable(url: str, *, key: str) -> None:
    """Reads the first bytes of a remote shard.

    Raises:
        UserError: it cannot be reached.
    """
    file = RemoteFile(url)
    try:
        file.read(1)
    except Unreachable as error:
        raise UserError(f"{key}: the shard {url[:200]} cannot be reached ({error})") from None
    finally:
        file.close()


def may_pass(error: BaseException) -> bool:
    """Whether trying again may help: not where the other side has said that there is nothing to have."""
    if (status := _status(error)) is not None:
        return not 400 <= status < 500 or status in PASSING
    return not isinstance(error, FINAL) and type(error).__name__ != "OfflineModeIsEnabled"  # of the Hugging Face hub


def described(error: BaseException, url: str) -> str:
    """Of an error, a line."""
    if (status := _status(error)) is not None:
        return f"the server answers {status}"
    if isinstance(error, FileNotFoundError):
        hint = ", and wildcards are for local shards: use braces" if "*" in url else ""
        return f"there is no such file{hint}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _status(error: BaseException) -> int | None:
    """Of an answer by HTTP."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code"):
            if type(status := getattr(holder, name, None)) is int:
                return status
    return None


def _http(url: str) -> Any:
    import aiohttp

    # What is quoted already, such as a signature, is left as it is; proxies are those of the environment.
    return fsspec.filesystem(
        "http", encoded="%" in url, client_kwargs={"timeout": aiohttp.ClientTimeout(**TIMEOUT), "trust_env": True}
    )
