"""Reading shards: which, what of them is skipped, and one pass over them split over ranks and workers."""

import glob
import logging
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import braceexpand
import torch
import torch.distributed as dist
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import base_plus_ext

from grn.checkpoints.reading import trusted
from grn.data.samples import (
    CAPTION_SUFFIXES,
    FEATURE_SUFFIXES,
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    METADATA_SUFFIXES,
    TOKEN_SUFFIXES,
    VIDEO_SUFFIXES,
    Reason,
    Skip,
)
from grn.errors import UserError

log = logging.getLogger(__name__)

MAX_URLS = 10**6  # that braces may stand for
MAX_ENTRY_BYTES = (
    dict.fromkeys(VIDEO_SUFFIXES, 512 * 2**20)
    | dict.fromkeys((*IMAGE_SUFFIXES, *TOKEN_SUFFIXES, *FEATURE_SUFFIXES), 64 * 2**20)
    | dict.fromkeys((*LABEL_SUFFIXES, *CAPTION_SUFFIXES, *METADATA_SUFFIXES), 2**20)
)


class ShardDataset(IterableDataset):
    """What reads shards: decodes their samples, and counts what it has to skip.

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
        self._skipped = torch.zeros(max(1, num_workers), len(Reason), dtype=torch.int64).share_memory_()

    def skipped(self) -> dict[str, int]:
        """Reason -> how many samples (or rests of shards) all workers of this rank have skipped so far; no zeros."""
        counts = self._skipped.sum(dim=0).tolist()
        return {reason.value: count for reason, count in zip(Reason, counts) if count}

    def shard(self, url: str) -> Iterator[dict]:
        """The raw samples of a shard, as far as it can be read."""
        try:
            yield from read_shard(url, self.max_entry_bytes)
        except Exception as error:  # a broken archive, a lost mount, a failed download: what these raise has no end
            self._count(Reason.BROKEN_SHARD, url, detail=f"{type(error).__name__}: {error}")

    def decoded(self, raw: dict, pass_number: int) -> dict | None:
        """The sample; None for an unusable one, which is counted."""
        try:
            return self.decode(raw, pass_number)
        except Skip as skip:
            self._count(skip.reason, raw["__url__"], raw["__key__"])
            return None

    def _count(self, reason: Reason, url: str, key: str | None = None, detail: str = "") -> None:
        worker_id, _ = worker_and_workers()
        column = list(Reason).index(reason)
        if not self._skipped[:, column].any():
            place = f"sample {key!r} of {url}" if key is not None else f"rest of {url}"
            detail = f" ({detail})" if detail else ""
            log.warning("skipping %s: %s%s; further ones are only counted", place, reason.value, detail)
        self._skipped[worker_id % len(self._skipped), column] += 1


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

    def __iter__(self) -> Iterator[dict]:
        worker_id, workers = worker_and_workers()
        reader, readers = worker_id * self.world_size + self.rank, self.world_size * workers
        # Readers beyond the number of shards share shards and take turns at the samples.
        shards = len(self.urls)
        sharing = len(range(reader % shards, readers, shards))
        own = self.urls[reader % shards :: readers]
        for raw in islice((raw for url in own for raw in self.shard(url)), reader // shards, None, sharing):
            if (sample := self.decoded(raw, 0)) is not None:
                yield sample


def report_skipped(skipped: Mapping[str, int]) -> None:
    """Logs one line of what the data could not give (`skipped()`); nothing where all was good."""
    if skipped:
        log.warning("skipped samples: %s", ", ".join(f"{count} x {reason}" for reason, count in skipped.items()))


def rank_and_world_size() -> tuple[int, int]:
    """Of the process group where there is one (Lightning's, torchrun's)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def worker_and_workers() -> tuple[int, int]:
    """Which worker process of a DataLoader this is, of how many; (0, 1) in the main process."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


def resolve_urls(patterns: str | Sequence[str], *, key: str, remedy: str) -> list[str]:
    """Expands braces and local wildcards, and checks what can be checked without reading.

    Args:
        patterns: local paths, `file://`, `http(s)://`, `pipe:` and whatever else webdataset opens.
        key: the config key they come from, for messages.
        remedy: what to do where there are none.

    Returns:
        The shards in order, each once.

    Raises:
        UserError: a local shard is missing or empty, or there are none at all.
    """
    urls = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            expanded = expand_braces(pattern)
        except ValueError as error:
            raise UserError(f"{key}={pattern[:200]}: {error}") from None
        for url in expanded:
            path = local_path(url)
            urls += [url] if path is None else local_shards(path, key=key, remedy=remedy)
    if not urls:
        raise UserError(f"{key} names no shards; {remedy}")
    return list(dict.fromkeys(urls))


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
    """Sees to it that what a file says of shards has only paths and http(s) read: other urls are shell commands
    (`pipe:`), or run one.

    Args:
        source: the file, for messages: a manifest or checkpoint, which may be anyone's.
        given: config key -> what the file says in its place (`patterns` of `resolve_urls`), None for nothing.

    Raises:
        UserError: another scheme, which the environment variable GRN_TRUST does not name.
    """
    asked = " ".join(f"{key}=..." for key, patterns in given.items() if patterns is not None)
    for patterns in filter(None, given.values()):
        found = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(found, list) or not all(isinstance(pattern, str) for pattern in found):
            raise UserError(f"{source}: no shards can be at {str(patterns)[:100]}; give {asked}")
        try:
            urls = [url for pattern in found for url in expand_braces(pattern)]
        except ValueError as error:
            raise UserError(f"{source} names shards {str(patterns)[:100]!r}: {error}; give {asked}") from None
        for url in urls:
            scheme = url.partition(":")[0]
            if local_path(url) is None and scheme not in {"http", "https", *trusted()}:
                raise UserError(
                    f"{source} has shards read by a command, {url[:100]!r}, which may be anyone's: give {asked} "
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
    """The path of a local url; None for what webdataset opens by other means."""
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    if url.startswith("pipe:") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url):
        return None
    return Path(url).expanduser()


def read_shard(url: str, max_entry_bytes: dict[str, int]) -> Iterator[dict]:
    """The raw samples of one tar: {"__key__", "__url__", suffix: bytes, ...}, grouped as webdataset does.

    (webdataset's own reader is passed over as it reads entries of any size and takes a damaged tar for a short one.)
    An entry that is too large or stands twice is a `Reason` in place of its bytes.

    Raises:
        tarfile.ReadError: a damaged or truncated tar; the sample it breaks off in is not given.
        OSError: the stream cannot be opened or read.
    """
    path = local_path(url)
    with (
        closing(path.open("rb") if path is not None else wds.gopen(url)) as stream,
        tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo, errors="replace") as archive,
    ):
        for key, entries in groupby(_entries(archive, max_entry_bytes), key=itemgetter(0)):
            raw = {"__key__": key, "__url__": url}
            for _, suffix, data in entries:
                raw[suffix] = Reason.DUPLICATE_ENTRY if suffix in raw else data
            yield raw


def _entries(archive: tarfile.TarFile, max_entry_bytes: dict[str, int]) -> Iterator[tuple[str, str, bytes | Reason]]:
    while (entry := archive.next()) is not None:
        archive.members.clear()  # a stream never goes back, yet keeps a list of all it has passed
        key, suffix = base_plus_ext(entry.name)
        if key is None or not entry.isreg():
            continue
        suffix = suffix.lower()
        if suffix.startswith("__"):  # `__key__` and `__url__` are the reader's to say
            continue
        if suffix not in max_entry_bytes:
            yield key, suffix, b""
        elif entry.size > max_entry_bytes[suffix]:
            yield key, suffix, Reason.OVERSIZE_ENTRY
        else:
            yield key, suffix, archive.extractfile(entry).read()


class _StrictTarInfo(tarfile.TarInfo):
    """A header that is cut or damaged is an error; tarfile alone would take it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:
            raise tarfile.ReadError(str(error)) from None
