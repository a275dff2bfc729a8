"""Reading shards: which, in which order, split over ranks and workers, and going on exactly where a run broke off."""

import glob
import logging
import random
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import braceexpand
import torch
import torch.distributed as dist
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from webdataset.tariterators import base_plus_ext

from grn.data.samples import (
    CAPTION_SUFFIXES,
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

MAX_ENTRY_BYTES = (
    dict.fromkeys(VIDEO_SUFFIXES, 512 * 2**20)
    | dict.fromkeys((*IMAGE_SUFFIXES, *TOKEN_SUFFIXES), 64 * 2**20)
    | dict.fromkeys((*LABEL_SUFFIXES, *CAPTION_SUFFIXES, *METADATA_SUFFIXES), 2**20)
)


class ShardStream(IterableDataset):
    """The decoded samples of this rank's and this worker's share of the shards.

    A pass visits every sample of all shards once over all ranks and workers. Its order is a function of (seed, number
    of the pass): shards permuted, dealt to ranks and workers, then drawn from a shuffle buffer. An endless stream makes
    one pass after another and goes on where it is when iterated again; otherwise each iteration is one whole pass.

    `state_dict()` is the place in the stream just after the last sample it gave, counted in *raw* samples of the pass,
    so that samples which cannot be decoded shift nothing. Resuming replays the pass undecoded up to there.

    Args:
        urls: the shards, from `resolve_urls`.
        decode: (raw sample, number of the pass) -> sample; raises `Skip` for an unusable one.
        endless: pass after pass; needs a shard for every worker of every rank.
        shuffle: permute the shards and draw from the buffer; else the order of the shards and within them.
        shuffle_buffer: undecoded samples held by each worker to draw from.
        seed: of the order.
        num_workers: as the DataLoader has it.
        split_by_rank: each rank reads its share; else every rank reads everything, in the same order.
        length: samples that `len` tells (steps of the run times batch size); None: no length.
        max_entry_bytes: suffix -> the largest entry that is read; entries of other suffixes are never read.

    Raises:
        UserError: endless with fewer shards than workers over all ranks; later, from iterating: a whole pass of an
            endless stream without a usable sample.
    """

    def __init__(
        self,
        urls: Sequence[str],
        decode: Callable[[dict, int], dict],
        *,
        endless: bool,
        shuffle: bool,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        num_workers: int = 0,
        split_by_rank: bool = True,
        length: int | None = None,
        max_entry_bytes: dict[str, int] | None = None,
    ):
        self.urls = list(urls)
        self.decode = decode
        self.endless = endless
        self.shuffle = shuffle
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.length = length
        self.max_entry_bytes = max_entry_bytes or MAX_ENTRY_BYTES
        self.rank, self.world_size = rank_and_world_size() if split_by_rank else (0, 1)
        readers = self.world_size * max(1, num_workers)
        if endless and len(self.urls) < readers:
            raise UserError(
                f"data.num_workers={num_workers} on {self.world_size} ranks needs {readers} shards, there are only "
                f"{len(self.urls)}: lower data.num_workers or write more shards"
            )
        self._pass, self._raw = 0, 0
        # A row for each worker, as adding to a shared number is not atomic.
        self._skipped = torch.zeros(max(1, num_workers), len(Reason), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("a stream without `length` has no len()")
        return self.length

    def __iter__(self) -> Iterator[dict]:
        if not self.endless:
            self._pass, self._raw = 0, 0
        return self._samples()

    def state_dict(self) -> dict[str, int]:
        """Where the stream is: the number of the pass, and how many raw samples of it are done."""
        return {"pass": self._pass, "raw": self._raw}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._pass, self._raw = int(state["pass"]), int(state["raw"])

    def skipped(self) -> dict[str, int]:
        """Reason -> how many samples (or rests of shards) all workers of this rank have skipped so far; no zeros."""
        counts = self._skipped.sum(dim=0).tolist()
        return {reason.value: count for reason, count in zip(Reason, counts) if count}

    def _samples(self) -> Iterator[dict]:
        number, done = self._pass, self._raw
        while True:
            usable = done > 0
            for index, raw in enumerate(self._raw_samples(number)):
                if index < done:
                    continue
                try:
                    sample = self.decode(raw, number)
                except Skip as skip:
                    self._count(skip.reason, raw["__url__"], raw["__key__"])
                    continue
                usable = True
                # Before the yield: whoever asks for the state does so while this generator rests there.
                self._pass, self._raw = number, index + 1
                yield sample
            if not self.endless:
                return
            if not usable:
                counts = ", ".join(f"{reason}: {count}" for reason, count in self.skipped().items())
                raise UserError(
                    f"a whole pass over the shards of a worker has no usable sample ({counts or 'they are empty'}); "
                    f"check the data.* keys and the shards, the first is {self.urls[0]}"
                )
            number, done = number + 1, 0

    def _raw_samples(self, number: int) -> Iterator[dict]:
        """This reader's share of a pass, in order, undecoded."""
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        reader, readers = worker_id * self.world_size + self.rank, self.world_size * workers
        urls = list(self.urls)
        if self.shuffle:
            random.Random(f"shards/{self.seed}/{number}").shuffle(urls)
        # Readers beyond the number of shards (evaluation only) share shards and take turns at the samples.
        shards = len(urls)
        sharing = len(range(reader % shards, readers, shards))
        own = urls[reader % shards :: readers]
        samples = islice((raw for url in own for raw in self._shard(url)), reader // shards, None, sharing)
        if self.shuffle:
            rng = random.Random(f"samples/{self.seed}/{number}/{reader}")
            samples = wds.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=rng)(samples)
        return samples

    def _shard(self, url: str) -> Iterator[dict]:
        try:
            yield from read_shard(url, self.max_entry_bytes)
        except Exception as error:  # a broken archive, a lost mount, a failed download: what these raise has no end
            self._count(Reason.BROKEN_SHARD, url, detail=f"{type(error).__name__}: {error}")

    def _count(self, reason: Reason, url: str, key: str | None = None, detail: str = "") -> None:
        worker = get_worker_info()
        column = list(Reason).index(reason)
        if not self._skipped[:, column].any():
            place = f"sample {key!r} of {url}" if key is not None else f"rest of {url}"
            detail = f" ({detail})" if detail else ""
            log.warning("skipping %s: %s%s; further ones are only counted", place, reason.value, detail)
        self._skipped[worker.id % len(self._skipped) if worker else 0, column] += 1


class ResumableLoader(StatefulDataLoader):
    """A StatefulDataLoader whose state holds the places of all ranks: Lightning saves the state of rank 0 alone.

    `state_dict` is therefore collective: every rank must call it, as Lightning does when it saves.
    """

    def __init__(self, dataset: ShardStream, **arguments):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            super().__init__(dataset, **arguments)

    def state_dict(self) -> dict:
        own = super().state_dict()
        states = [own]
        if dist.is_available() and dist.is_initialized():
            states = [None] * dist.get_world_size()
            dist.all_gather_object(states, own)
        return {"num_workers": self.num_workers, "ranks": states}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from `state_dict()`.

        Raises:
            UserError: the state is of another number of ranks or workers, whose shares of the data are others.
        """
        if not state:
            return
        rank, world_size = rank_and_world_size()
        saved = (len(state["ranks"]), state["num_workers"])
        if saved != (world_size, self.num_workers):
            raise UserError(
                f"the checkpoint's place in the data is of {saved[0]} ranks with data.num_workers={saved[1]}, this run "
                f"has {world_size} with {self.num_workers}: go on with the same numbers"
            )
        super().load_state_dict(state["ranks"][rank])


def report_skipped(skipped: Mapping[str, int]) -> None:
    """Logs one line of what the data could not give (`skipped()`); nothing where all was good."""
    if skipped:
        log.warning("skipped samples: %s", ", ".join(f"{count} x {reason}" for reason, count in skipped.items()))


def rank_and_world_size() -> tuple[int, int]:
    """Of the process group where there is one (Lightning's, torchrun's)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


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
            expanded = list(braceexpand.braceexpand(pattern))
        except ValueError as error:
            raise UserError(f"{key}={pattern}: {error}") from None
        for url in expanded:
            path = local_path(url)
            if path is None:
                urls.append(url)
                continue
            found = [str(path)] if path.exists() or not glob.has_magic(str(path)) else sorted(glob.glob(str(path)))
            if not found:
                raise UserError(f"{key}: no shards at {path}; {remedy}")
            for shard in found:
                if not Path(shard).is_file():
                    raise UserError(f"{key}: no shard at {shard}; {remedy}")
                if Path(shard).stat().st_size == 0:
                    raise UserError(f"{key}: the shard {shard} is empty; {remedy}")
            urls += found
    if not urls:
        raise UserError(f"{key} names no shards; {remedy}")
    return list(dict.fromkeys(urls))


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
