"""Streams shards: expands their names, splits them over ranks and workers, skips bad samples."""

import glob
import logging
import re
import tarfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import braceexpand
import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext

from grn.data.samples import (
    CAPTION_SUFFIXES,
    FEATURE_SUFFIXES,
    LABEL_SUFFIXES,
    METADATA_SUFFIXES,
    TOKEN_SUFFIXES,
    decode_or_skip,
)
from grn.data.stream.remote import RemoteFile, Unreachable, check_reachable, check_scheme
from grn.data.stream.tar import ByteStream, TarReader
from grn.media.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from grn.media.skips import Note, Reason, Skip, noting
from grn.runtime.errors import UserError
from grn.runtime.ranks import rank_and_world_size
from grn.runtime.secrets import CUT, cut
from grn.weights.reading import trusted

log = logging.getLogger(__name__)

KINDS = (*Reason, *Note)  # of what is counted
MAX_URLS = 10**6  # that braces may stand for
FEW, LONGEST = 4, 60  # names in a message, letters of a name
ABSENT = {Reason.NO_IMAGE, Reason.NO_VIDEO, Reason.NO_LABEL, Reason.NO_CAPTION, Reason.NO_TOKENS, Reason.NO_FEATURES}
CLUTTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
CLUTTER_FOLDERS = re.compile(r"__macosx|paxheaders?(\..*)?|@eadir|\$recycle\.bin|system volume information")
MAX_ENTRY_BYTES = (
    dict.fromkeys(VIDEO_SUFFIXES, 512 * 2**20)
    | dict.fromkeys((*IMAGE_SUFFIXES, *TOKEN_SUFFIXES, *FEATURE_SUFFIXES), 64 * 2**20)
    | dict.fromkeys((*LABEL_SUFFIXES, *CAPTION_SUFFIXES, *METADATA_SUFFIXES), 2**20)
)


class LoadingStopped(Exception):
    """The samples are not wanted any more: the run is to end."""


class ShardDataset(IterableDataset):
    """What reads shards: decodes their samples, and counts what it has to skip, or uses all the same.

    Args:
        urls: the shards, from `resolve_urls`.
        decode: (raw sample, number of the pass over the data) -> sample; raises `Skip` for an unusable one.
        num_workers: as the DataLoader has it.
        max_entry_bytes: suffix -> the largest entry that is read; entries of other suffixes are never read.
    """

    def __init__(
        self,
        urls: Sequence[str],
        decode: Callable[[dict, int], dict],
        *,
        num_workers: int = 0,
        max_entry_bytes: dict[str, int] | None = None,
    ):
        self.urls = list(urls)
        self.decode = decode
        self.num_workers = num_workers
        self.max_entry_bytes = max_entry_bytes or MAX_ENTRY_BYTES
        # A row for each worker, as adding to a shared number is not atomic.
        self._counts = torch.zeros(max(1, num_workers), len(KINDS), dtype=torch.int64).share_memory_()
        self._stop = torch.zeros((), dtype=torch.int64).share_memory_()

    def stop(self, number: int) -> None:
        """Ends the reading soon, in all workers, between two samples or within one that is read: `LoadingStopped`.

        Args:
            number: of the signal that has it end; positive.
        """
        self._stop.fill_(number)

    def stop_with(self, other: "ShardDataset") -> None:
        """Has it end where `other` is told to `stop`."""
        self._stop = other._stop

    @property
    def stopped_by(self) -> int:
        """What `stop` was given; 0 before."""
        return int(self._stop)

    def _check_wanted(self) -> None:
        if self._stop:
            raise LoadingStopped

    def skipped(self) -> dict[str, int]:
        """Reason -> how many samples (or rests of shards) all workers of this rank have skipped so far; no zeros."""
        return self._counted(Reason)

    def noted(self) -> dict[str, int]:
        """Note -> how many samples with it all workers of this rank have used all the same so far; no zeros."""
        return self._counted(Note)

    def shard(self, url: str) -> Iterator[dict]:
        """The raw samples of a shard, as far as it can be read."""
        try:
            yield from read_shard(url, self.max_entry_bytes, check=self._check_wanted)
        except LoadingStopped:
            raise
        except Unreachable as error:
            self._count(Reason.UNREACHABLE_SHARD, url, detail=str(error))
        except Exception as error:  # a broken archive, a lost mount: what these raise has no end
            self._count(Reason.BROKEN_SHARD, url, detail=f"{type(error).__name__}: {error}")

    def decoded(self, raw: dict, pass_number: int) -> dict | None:
        """The sample; None for an unusable one, which is counted."""
        self._check_wanted()
        with noting() as notes:
            try:
                sample = decode_or_skip(self.decode, raw, pass_number)
            except Skip as skip:
                detail = f"it has {suffixes(raw) or 'nothing'}" if skip.reason in ABSENT else skip.detail
                self._count(skip.reason, raw["__url__"], raw["__key__"], detail)
                return None
        for note in notes:
            self._count(note, raw["__url__"], raw["__key__"])
        return sample

    def _count(self, kind: Reason | Note, url: str, key: str | None = None, detail: str = "") -> None:
        worker_id, _ = worker_and_workers()
        column = KINDS.index(kind)
        if not self._counts[:, column].any():
            verb = "skipping" if isinstance(kind, Reason) else "using"
            shard = repr(cut(url)) if url.startswith("pipe:") else cut(url)
            place = f"sample {key!r} of {shard}" if key is not None else f"rest of {shard}"
            detail = f" ({detail})" if detail else ""
            log.warning("%s %s: %s%s; further ones are only counted", verb, place, kind.value, detail)
        self._counts[worker_id % len(self._counts), column] += 1

    def _counted(self, kinds: type[Reason] | type[Note]) -> dict[str, int]:
        counts = zip(KINDS, self._counts.sum(dim=0).tolist())
        return {kind.value: count for kind, count in counts if count and isinstance(kind, kinds)}


class ShardStream(ShardDataset):
    """One pass over the shards in their own order, for evaluation; each iteration starts it afresh.

    Every sample is given once over all ranks and workers, also where these are more than the shards.

    Args:
        split_by_rank: each rank reads its share; else every rank reads everything.
        others: as `ShardDataset` has them.
    """

    def __init__(
        self, urls: Sequence[str], decode: Callable[[dict, int], dict], *, split_by_rank: bool = True, **others: Any
    ):
        super().__init__(urls, decode, **others)
        self.rank, self.world_size = rank_and_world_size() if split_by_rank else (0, 1)

    def __iter__(self) -> Generator[dict]:
        worker_id, workers = worker_and_workers()
        reader, readers = worker_id * self.world_size + self.rank, self.world_size * workers
        # Readers beyond the number of shards share shards and take turns at the samples.
        shards = len(self.urls)
        sharing = len(range(reader % shards, readers, shards))
        own = self.urls[reader % shards :: readers]
        for raw in islice((raw for url in own for raw in self.shard(url)), reader // shards, None, sharing):
            if (sample := self.decoded(raw, 0)) is not None:
                yield sample


def report_skipped(skipped: Mapping[str, int], noted: Mapping[str, int]) -> None:
    """Logs, on the first rank, a line of what the data could not give (`skipped()`) and one of what they gave all the
    same (`noted()`); none where all was good."""
    for what, counts in {"skipped samples": skipped, "samples used all the same": noted}.items():
        if counts and rank_and_world_size()[0] == 0:
            log.warning("%s: %s", what, ", ".join(f"{count} x {kind}" for kind, count in counts.items()))


def suffixes(raw: Mapping[str, object]) -> str:
    """The suffixes that a raw sample has, for a message: "jpg, json, txt"."""
    found = [suffix for suffix in raw if not suffix.startswith("__")]
    more = f" and {len(found) - FEW} more" if len(found) > FEW else ""
    return ", ".join(map(printable, found[:FEW])) + more


def printable(name: str) -> str:
    """A name out of a shard, for a message: short, and in one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:LONGEST])


def worker_and_workers() -> tuple[int, int]:
    """Which worker process of a DataLoader this is, of how many; (0, 1) in the main process."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


def resolve_urls(patterns: str | Sequence[str], *, key: str, remedy: str) -> list[str]:
    """Expands braces and local wildcards, and checks what can be checked without reading.

    Args:
        patterns: local paths, `file://`, `http(s)://`, `pipe:` and whatever else fsspec opens (`s3://`, `hf://` ...).
        key: the config key they come from, for messages.
        remedy: what to do where there are none.

    Returns:
        The shards in order, each once.

    Raises:
        UserError: a local shard is missing or empty, a scheme is unknown or needs a package, or there are none at all.
    """
    urls = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            expanded = expand_braces(pattern)
        except ValueError as error:
            raise UserError(f"{key}={pattern[:200]!r}: {error}") from None
        for url in expanded:
            if (path := local_path(url)) is None:
                check_scheme(url, key=key)
                urls.append(url)
            else:
                urls += local_shards(path, key=key, remedy=remedy)
    if not urls:
        raise UserError(f"{key} names no shards; {remedy}")
    return list(dict.fromkeys(urls))


def check_first(urls: Sequence[str], *, key: str) -> None:
    """Reads the first bytes of the first shard, if that is remote: one that cannot be reached is told at once.

    Raises:
        UserError: it cannot.
    """
    remote = [url for url in urls[:1] if local_path(url) is None and not url.startswith("pipe:")]
    for url in remote:
        check_reachable(url, key=key)


def local_shards(path: Path, *, key: str, remedy: str) -> list[str]:
    """The urls of a local shard, or of those that a wildcard stands for; errors as of `resolve_urls`."""
    found = [path] if path.exists() or not glob.has_magic(str(path)) else map(Path, sorted(glob.glob(str(path))))
    urls = []
    for shard in found:
        if not shard.is_file():
            raise UserError(f"{key}: no shard at {shard}; {remedy}")
        if shard.stat().st_size == 0:
            raise UserError(f"{key}: the shard {shard} is empty; {remedy}")
        urls.append(local_url(shard))
    if not urls:
        raise UserError(f"{key}: no shards at {path}; {remedy}")
    return urls


def check_foreign_urls(source: str, given: Mapping[str, object]) -> None:
    """Checks that what a file says of shards names only paths and http(s): other urls are shell commands (`pipe:`), or
    run one.

    Args:
        source: the file, for messages: a manifest or checkpoint, which may be anyone's.
        given: config key -> what the file says in its place (`patterns` of `resolve_urls`), None for nothing.

    Raises:
        UserError: another scheme, which the environment variable GRN_TRUST does not name.
        UserError: or what gave access to them was cut when it was recorded.
    """
    asked = " ".join(f"{key}=..." for key, patterns in given.items() if patterns is not None)
    for patterns in filter(None, given.values()):
        found = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(found, list) or not all(isinstance(pattern, str) for pattern in found):
            raise UserError(f"{source}: no shards can be at {str(patterns)[:100]}; give {asked}")
        if odd := [pattern for pattern in found if CUT in pattern]:
            raise UserError(
                f"{source} has {odd[0][:100]!r}, whose query, credentials or command were removed; give {asked} here"
            )
        try:
            urls = [url for pattern in found for url in expand_braces(pattern)]
        except ValueError as error:
            raise UserError(f"{source} names shards {str(patterns)[:100]!r}: {error}; give {asked}") from None
        for url in urls:
            scheme = url.partition(":")[0]
            if local_path(url) is None and scheme not in {"http", "https", *trusted()}:
                raise UserError(
                    f"{source} has shards read by a command, {url[:100]!r}, which could execute anything: give {asked} "
                    f"here, or, if you trust the file, set GRN_TRUST={scheme}"
                )


def expand_braces(pattern: str) -> list[str]:
    """Raises:
    ValueError: braces that do not match, or that stand for more than `MAX_URLS`, which are not even counted out.
    """
    number = 1
    for group in re.findall(r"\{([^{}]*)\}", pattern):
        bounds = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?", group)
        number *= abs(int(bounds[2]) - int(bounds[1])) + 1 if bounds else group.count(",") + 1
    if number > MAX_URLS:
        raise ValueError(f"its braces stand for more than {MAX_URLS} shards")
    return list(braceexpand.braceexpand(pattern))


def local_url(path: Path) -> str:
    """The url that is read as this path, also where the name of its first folder looks like a scheme."""
    odd = re.match(r"~|[A-Za-z][A-Za-z0-9+.-]*:", str(path))
    return str(path.absolute() if odd else path)


def local_path(url: str) -> Path | None:
    """The path of a local url; None for a command or what lies elsewhere."""
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    if url.startswith("pipe:") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url):
        return None
    return Path(url).expanduser()


def read_shard(
    url: str, max_entry_bytes: dict[str, int], *, check: Callable[[], None] = lambda: None
) -> Generator[dict]:
    """The raw samples of one tar: {"__key__", "__url__", suffix: bytes, ...}, grouped as webdataset does.

    (webdataset's own reader is passed over as it reads entries of any size and takes a damaged tar for a short one.)
    An entry that is too large or stands twice is a `Reason` in place of its bytes.

    Args:
        check: called now and then; may raise to end the reading.

    Raises:
        tarfile.ReadError: a damaged or truncated tar, or one that claims more bytes than it has; the sample it breaks
            off in is not given.
        Unreachable: a remote shard cannot be reached, or not be read to its end, after a few attempts.
        OSError: the stream cannot be opened or read.
    """
    path = local_path(url)
    with _closing(open_shard(url, check)) as stream:
        length = path.stat().st_size if path is not None and path.is_file() else None
        archive = TarReader(stream, length=length, check=check)
        for key, entries in groupby(_entries(archive, max_entry_bytes), key=itemgetter(0)):
            raw, error = {"__key__": key, "__url__": url}, None
            try:
                for _, suffix, data in entries:
                    raw[suffix] = Reason.DUPLICATE_ENTRY if suffix in raw else data
            except tarfile.ReadError as caught:
                if not archive.ended:
                    raise
                error = caught  # of what follows the archive whose last sample this is
            yield raw
            if error is not None:
                raise error


def open_shard(url: str, check: Callable[[], None] = lambda: None) -> ByteStream:
    """The bytes of a shard, packed or not."""
    if (path := local_path(url)) is not None:
        return path.open("rb")
    if url.startswith("pipe:"):
        return gopen(url)
    return RemoteFile(url, check=check)


def is_clutter(path: str) -> bool:
    """Whether a file is what archivers and file managers add to those of a data set: `._x.jpg`, `Thumbs.db` ..."""
    *folders, name = path.lower().split("/")
    return name.startswith(".") or name in CLUTTER or any(CLUTTER_FOLDERS.fullmatch(folder) for folder in folders)


@contextmanager
def _closing(stream: ByteStream) -> Iterator[ByteStream]:
    """As `contextlib.closing`, but a command whose output is not wanted any more is not waited for."""
    try:
        yield stream
    except BaseException:
        if (process := getattr(stream, "proc", None)) is not None:
            process.kill()
        with suppress(Exception):  # that it was killed
            stream.close()
        raise
    stream.close()


def _entries(archive: TarReader, max_entry_bytes: dict[str, int]) -> Iterator[tuple[str, str, bytes | Reason]]:
    """(key, suffix, bytes) of each file."""
    for name, size in archive:
        key, suffix = base_plus_ext(name)
        if key is None or suffix is None or is_clutter(name):
            continue
        suffix = suffix.lower()
        if suffix.startswith("__"):  # `__key__` and `__url__` are the reader's to say
            continue
        if suffix not in max_entry_bytes:
            yield key, suffix, b""
        elif size > max_entry_bytes[suffix]:
            yield key, suffix, Reason.OVERSIZE_ENTRY
        else:
            yield key, suffix, archive.read()
