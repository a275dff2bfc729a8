"""The partial folder of a data set being written: what a killed run resumes from."""

import json
import os
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from grn.data.manifest import MAX_BYTES
from grn.data.prepare.pool import check_stopped
from grn.runtime.errors import UserError
from grn.runtime.files import read_bounded, sha256_of, temporary_folder, write_atomically, write_json


@dataclass(frozen=True)
class Rejected:
    """A sample that cannot be used: which (for people to find it), and why (a value of `grn.media.skips.Reason`)."""

    item: str
    reason: str


@dataclass(frozen=True)
class Noted:
    """A sample that is used all the same: which, and what is not right about it (a `grn.media.skips.Note`'s value)."""

    item: str
    note: str


@dataclass(frozen=True)
class Job:
    """A shard to write."""

    split: str
    number: int
    description: object

    @property
    def shard(self) -> str:
        return f"{self.split}-{self.number:06d}"


@dataclass(frozen=True)
class PartialFolder:
    """`<path>/shards/*.tar`, a json beside them for each that is finished, and whose beginning it is.

    Several processes may work in it. It appears and goes at once, always with its identity.
    """

    path: Path

    @property
    def shards(self) -> Path:
        """Of the shards as long as some are missing."""
        return self.path / "shards"

    @property
    def complete(self) -> Path:
        """What `shards` becomes as it is about to be published."""
        return self.path / "complete"

    def begin(self, identity: Mapping[str, object], *, overwrite: bool, afresh: bool, rank: int) -> None:
        """Makes the folder, or goes on in it where it is of the same identity.

        Args:
            identity: {"name", "parameters", "facts", "shards"}, JSON values.
            overwrite: start over where it is of another identity; rank 0 does, the others wait for it.
            afresh: start over in any case.

        Raises:
            UserError: it is of another identity, is none of ours, or cannot be made.
        """
        if afresh:
            self.remove()
        for _ in range(600):
            self._make(identity)
            found = self._identity()
            if found == identity:
                if self.complete.is_dir():  # killed as it was about to be published
                    os.replace(self.complete, self.shards)
                return
            if not overwrite:
                key, own, other = difference(identity, found)
                raise UserError(
                    f"{self.path} holds a partial data set made with {key}={other}, not {own}: "
                    "finish it with the same arguments, or overwrite=true to start over"
                )
            if rank == 0:
                self.remove()
            else:
                time.sleep(0.1)
        raise UserError(f"{self.path} is of other arguments and rank 0 has not started over: start rank 0 too")

    def finished(self, shard: str) -> dict | None:
        """{"name", "samples", "bytes", "sha256", "rejected": [[item, reason], ...], "noted": [[item, note], ...]}.

        None: not finished.
        """
        try:
            entry = {"noted": []} | json.loads(read_bounded(self._record(shard), MAX_BYTES))
            if entry["samples"] and (self.shards / entry["name"]).stat().st_size != entry["bytes"]:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return entry

    def finish(self, shard: str, entry: Mapping[str, object]) -> None:
        """Says that a shard is written."""
        write_json(self._record(shard), entry)

    def forget(self, shard: str) -> None:
        """Has a shard written again by the next call."""
        self._record(shard).unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the folder, if it is one of ours.

        Raises:
            UserError: it is not.
        """
        if self.path.exists():
            self._identity()
            with temporary_folder(self.path) as trash:
                os.replace(self.path, Path(trash, self.path.name))

    def _record(self, shard: str) -> Path:
        return self.path / f"{shard}.json"

    def _make(self, identity: Mapping[str, object]) -> None:
        if self.path.exists():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with temporary_folder(self.path) as scratch:
                fresh = PartialFolder(Path(scratch, "fresh"))  # with the usual permissions, unlike temporary folders
                fresh.shards.mkdir(parents=True)
                write_json(fresh.path / "identity.json", identity)
                os.rename(fresh.path, self.path)
        except OSError as error:
            if not self.path.exists():  # else another process was faster
                raise UserError(f"{self.path} cannot be made: {error.strerror}") from None

    def _identity(self) -> dict:
        with suppress(OSError, ValueError, AttributeError):
            identity = json.loads(read_bounded(self.path / "identity.json", MAX_BYTES))
            mappings = [identity.get(key) for key in ("parameters", "facts")]
            if all(isinstance(it, dict) for it in mappings) and "name" in identity and not self.path.is_symlink():
                return identity
        raise UserError(f"{self.path} exists and was not written by GRN: remove it")


@dataclass(frozen=True)
class ShardWriter:
    """Writes one shard (a callable for `run_jobs`): a tar unless none of its samples is usable, then its record.

    Raises:
        UserError: disk or memory are full.
    """

    folder: PartialFolder
    write: Callable[[object], Iterator[dict | Rejected | Noted]]

    def start_worker(self, index: int) -> None:
        if hasattr(self.write, "start_worker"):
            self.write.start_worker(index)

    def __call__(self, job: Job) -> dict:
        """-> the shard's entry as `PartialFolder.finished` gives it."""
        rejected, noted, samples = [], [], 0

        def fill(path: Path) -> None:
            nonlocal samples
            with (
                open(path, "wb") as file,
                TarWriter(file, user="grn", group="grn", mode=0o644, mtime=0, encoder=False) as tar,
            ):
                for sample in self.write(job.description):
                    check_stopped()
                    if isinstance(sample, Rejected):
                        rejected.append([sample.item, sample.reason])
                        continue
                    if isinstance(sample, Noted):
                        noted.append([sample.item, sample.note])
                        continue
                    data = {k: v.encode() if isinstance(v, str) else v for k, v in sample.items() if k != "__key__"}
                    tar.write(data | {"__key__": sample["__key__"]})
                    samples += 1

        try:
            tar = write_atomically(self.folder.shards / f"{job.shard}.tar", fill)
            entry = {"name": tar.name, "samples": samples, "bytes": tar.stat().st_size, "sha256": sha256_of(tar)}
            if not samples:
                tar.unlink()  # whose share it were would wait for samples in vain
            self.folder.finish(job.shard, entry | {"rejected": rejected, "noted": noted})
        except OSError as error:
            raise UserError(f"{job.shard}.tar was not finished: {error}; run again to resume") from error
        except MemoryError:
            raise UserError(f"{job.shard}.tar was not finished, out of memory: lower num_workers") from None
        return entry | {"rejected": rejected, "noted": noted}


def difference(own: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, str, str]:
    """The first key in which two identities differ, and both values, short enough for a message."""
    own, other = ({"name": it["name"]} | it["parameters"] | it.get("facts", {}) | it for it in (own, other))
    key = next(key for key in [*own, *other] if own.get(key) != other.get(key))
    first, second = (textwrap.shorten(str(it.get(key)), 80, placeholder="...") for it in (own, other))
    return key, first, second
