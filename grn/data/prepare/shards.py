"""Writes data sets as webdataset shards with a manifest, atomically."""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from grn.data.manifest import FORMAT, MANIFEST, read_manifest
from grn.data.prepare.partial import Job, Noted, PartialFolder, Rejected, ShardWriter, difference
from grn.data.prepare.pool import run_jobs
from grn.data.stream.streaming import local_url
from grn.media.skips import Reason
from grn.runtime.errors import UserError, check_count
from grn.runtime.files import write_json, write_text
from grn.runtime.interruption import Interrupted

log = logging.getLogger(__name__)

REJECTED = "rejected.jsonl"
MAX_KINDS = 12  # of files left out, in one line
Description = TypeVar("Description")  # of a shard


def write_shards(
    root: str | os.PathLike,
    *,
    name: str,
    parameters: Mapping[str, object],
    shards: Mapping[str, Sequence[Description]],
    write: Callable[[Description], Iterator[dict | Rejected | Noted]],
    facts: Mapping[str, object],
    left_out: Sequence[Rejected] = (),
    explain: Callable[[str, Sequence[str]], str] = lambda split, reasons: "",
    num_workers: int = 0,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> bool:
    """Writes `<root>/<split>-000000.tar` ..., `<root>/manifest.json`, and `<root>/rejected.jsonl` where there are any.

    Everything is written to `.<name of root>.partial` beside `root` and moved there at once, so `root` is never half
    written. Whoever was killed goes on with the shards that are missing. The bytes depend on the arguments alone, not
    on how many processes share the work. A shard without a usable sample gets no tar.

    Args:
        root: folder to write; may be missing or empty, or hold what an earlier call wrote.
        name: of the data set.
        parameters: what the samples were made from (JSON values); tells whether `root` is up to date.
        shards: name of a split -> a description of each of its shards: picklable, its `repr` telling all of it.
        write: description -> its samples, {"__key__": str, suffix: bytes or str, ...}, what was rejected, and notes.
            Pickled once per process, see `grn.data.prepare.pool.run_jobs` (also for its optional `start_worker`).
        facts: what the manifest tells of the data beside this: image_size, num_labels, label_names (JSON values).
        left_out: files of the source that are in none of its shards.
        explain: (a split without a usable sample, the reasons) -> what there is to say of it, if anything.
        num_workers: processes that write; 0: this one.
        overwrite: replace a data set in `root` that was made with other parameters, or is damaged; and start over
            where an earlier call was killed (several processes do so only where that had other arguments).
        rank: of this process among those that share the work on one file system; it writes shards rank::world_size.
        world_size: how many those are. The one that completes the data set moves it to `root`.

    Returns:
        Whether this process had a part in it; False where `root` is up to date already.

    Raises:
        UserError: `root` holds something else, the partial folder is of other arguments, a split has no usable sample,
            the disk is full.
    """
    root = Path(root).absolute()
    parameters, facts = _plain(parameters), _plain(facts)
    _check_arguments(shards, num_workers, rank, world_size)
    # Several processes cannot tell what an earlier call left from what the others have just written.
    afresh = overwrite and world_size == 1
    if root.exists() and not afresh:
        try:
            if _is_up_to_date(root, name, parameters):
                log.info("%s is up to date: nothing to do", root)
                return False
        except UserError:
            if not overwrite:
                raise
    _check_replaceable(root)

    folder = PartialFolder(root.parent / f".{root.name}.partial")
    identity = {"name": name, "parameters": parameters, "facts": facts, "shards": _digest(shards)}
    folder.begin(identity, overwrite=overwrite, afresh=afresh, rank=rank)
    jobs = [Job(split, number, it) for split in shards for number, it in enumerate(shards[split])]
    _write_missing(folder, jobs[rank::world_size], write, num_workers, quiet=rank > 0)

    finished = {job.shard: entry for job in jobs if (entry := folder.finished(job.shard)) is not None}
    missing = len(jobs) - len(finished)
    if not folder.shards.is_dir():
        log.info("another process has moved the data to %s", root)
    elif missing:
        log.info("rank %d is done; %d of %d shards are still with the others", rank, missing, len(jobs))
    else:
        entries = {split: [finished[job.shard] for job in jobs if job.split == split] for split in shards}
        _check_usable(folder, entries, explain)
        manifest = {"format": FORMAT, "name": name, "parameters": parameters}
        manifest |= {"image_size": None, "num_labels": None, "label_names": None} | facts
        _publish(root, folder, manifest, entries, left_out)
    return True


def shard_paths(root: str | os.PathLike, manifest: Mapping[str, dict], split: str) -> list[str]:
    """The shards of a split in order, present and as large as the manifest says.

    Raises:
        UserError: no such split, a shard is missing or has another size.
    """
    if split not in manifest["splits"]:
        raise UserError(f"data.root={root} has no split {split!r}, only {', '.join(manifest['splits'])}")
    paths = []
    for shard in manifest["splits"][split]["shards"]:
        path = Path(root, shard["name"])
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
            command = "grn.encode ckpt=..." if "tokenizer" in manifest else f"grn.prepare data={manifest['name']}"
            raise UserError(f"data.root is damaged: {path} {found}; recreate it: python -m {command} overwrite=true")
        paths.append(local_url(path))
    return paths


def _plain(values: Mapping[str, object]) -> dict:
    return json.loads(json.dumps(dict(values)))


def _check_arguments(shards: Mapping[str, Sequence[object]], num_workers: int, rank: int, world_size: int) -> None:
    check_count("num_workers", num_workers, least=0)
    if not 0 <= rank < world_size:
        raise UserError(f"rank={rank} must be in 0 to world_size-1, and world_size is {world_size}")
    for split, descriptions in shards.items():
        if not descriptions:
            raise UserError(f"source: the {split} split has no samples")


def _digest(shards: Mapping[str, Sequence[object]]) -> str:
    digest = hashlib.sha256()
    for split, descriptions in shards.items():
        for description in descriptions:
            digest.update(f"{split} {description!r}\n".encode())
    return f"{sum(map(len, shards.values()))} of digest {digest.hexdigest()[:16]}"


def _write_missing(folder: PartialFolder, jobs: list[Job], write: Callable, num_workers: int, *, quiet: bool) -> None:
    missing = [job for job in jobs if folder.finished(job.shard) is None]
    done = len(jobs) - len(missing)
    if done:
        log.info("going on: %d of %d shards are written already", done, len(jobs))
    columns = (
        TextColumn("writing shards"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[samples]} samples, {task.fields[rejected]} rejected"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    results = run_jobs(ShardWriter(folder, write), missing, num_workers=num_workers)
    hidden = quiet or not get_console().is_terminal
    try:
        with Progress(*columns, transient=True, disable=hidden) as progress, closing(results):
            samples = rejected = 0
            bar = progress.add_task("", total=len(jobs), completed=done, samples=samples, rejected=rejected)
            for entry in results:
                samples, rejected = samples + entry["samples"], rejected + len(entry["rejected"])
                progress.update(bar, advance=1, samples=samples, rejected=rejected)
    except Interrupted as stopped:
        stopped.kept = f"finished shards stay in {folder.path}; the same command resumes from there"
        raise


def _check_usable(
    folder: PartialFolder, entries: Mapping[str, Sequence[dict]], explain: Callable[[str, Sequence[str]], str]
) -> None:
    for split, finished in entries.items():
        if not any(entry["samples"] for entry in finished):
            for entry in finished:  # so that whoever mends them need not know
                folder.forget(Path(entry["name"]).stem)
            reasons = [reason for entry in finished for _, reason in entry["rejected"]]
            said = f"source: no sample of the {split} split can be used ({_counts(reasons) or 'there are none'})"
            raise UserError("; ".join(filter(None, (said, explain(split, reasons)))))


def _publish(
    root: Path,
    folder: PartialFolder,
    manifest: dict,
    entries: Mapping[str, Sequence[dict]],
    left_out: Sequence[Rejected],
) -> None:
    """Moves the finished shards to `root`, with the manifest and the list of what was rejected or left out."""
    _check_replaceable(root)
    try:
        os.replace(folder.shards, folder.complete)  # of several processes one gets it
    except FileNotFoundError:
        log.info("another process has moved the data to %s", root)
        return

    names = {entry["name"] for finished in entries.values() for entry in finished}
    for path in folder.complete.iterdir():
        if path.name not in names:  # left by a process that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    manifest["splits"] = {split: _split_entry(finished) for split, finished in entries.items()}
    rejected = [
        {"split": split, "shard": entry["name"], "item": item, "reason": reason}
        for split, finished in entries.items()
        for entry in finished
        for item, reason in entry["rejected"]
    ]
    lines = rejected + [{"split": None, "shard": None, "item": it.item, "reason": it.reason} for it in left_out]
    if lines:
        write_text(folder.complete / REJECTED, "".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder.complete / MANIFEST, manifest)

    old = folder.path / "old"
    if root.exists() and any(root.iterdir()):
        os.replace(root, old)
    try:
        os.replace(folder.complete, root)
    except OSError:
        if old.exists():
            os.replace(old, root)
        raise
    folder.remove()
    log.info("wrote %s to %s", ", ".join(f"{s['samples']} {split}" for split, s in manifest["splits"].items()), root)
    if notes := [note for finished in entries.values() for entry in finished for _, note in entry["noted"]]:
        log.warning("used %d all the same (%s)", len(notes), _counts(notes))
    told = []
    if rejected:
        told.append(f"rejected {len(rejected)} ({_counts(line['reason'] for line in rejected)})")
    if left_out:
        kinds = Counter(it.reason.removeprefix(f"{Reason.OTHER_KIND.value}: ") for it in left_out).most_common()
        few = ", ".join(f"{kind} {count}" for kind, count in kinds[:MAX_KINDS])
        more = f", and {len(kinds) - MAX_KINDS} other kinds" if len(kinds) > MAX_KINDS else ""
        told.append(f"left out {len(left_out)} files: {few}{more}")
    if told:
        log.warning("%s, see %s", "; ".join(told), root / REJECTED)


def _split_entry(finished: Sequence[dict]) -> dict:
    keys = ("name", "samples", "bytes", "sha256")
    return {
        "samples": sum(entry["samples"] for entry in finished),
        "rejected": sum(len(entry["rejected"]) for entry in finished),
        "shards": [{key: entry[key] for key in keys} for entry in finished if entry["samples"]],
    }


def _counts(reasons: Iterable[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in Counter(reasons).most_common())


def _is_up_to_date(root: Path, name: str, parameters: dict) -> bool:
    """Raises a UserError where `root` holds another data set, or a damaged one."""
    manifest = read_manifest(root)
    if manifest is None:
        return False
    if (manifest["name"], manifest["parameters"]) != (name, parameters):
        identities = ({"name": name, "parameters": parameters}, {k: manifest[k] for k in ("name", "parameters")})
        key, own, other = difference(*identities)
        raise UserError(
            f"data.root={root} holds data made with {key}={other}, not {own}: "
            "give another data.root (of grn.encode: out), or overwrite=true to replace it"
        )
    for split in manifest["splits"]:
        shard_paths(root, manifest, split)
    return True


def _check_replaceable(root: Path) -> None:
    """Only what `write_shards` wrote is ever replaced, whatever `overwrite` says."""
    if root.exists() and not root.is_dir():
        raise UserError(f"data.root={root} is not a folder")
    if root.is_symlink():
        raise UserError(f"data.root={root} is a link: give the folder it points to")
    if root.exists() and any(root.iterdir()) and not (root / MANIFEST).is_file():
        raise UserError(f"data.root={root} holds files that GRN did not write: give another folder")
