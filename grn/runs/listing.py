"""Lists run folders: steps, curves, scores, pictures, checkpoints, and whether a run is in progress.

Read from files that other processes may be writing, and that may be somebody else's: reads are bounded, links to files
are not followed, and what is damaged becomes a line of `Run.problems`. Nothing here imports PyTorch.
"""

import csv
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from grn.runtime.files import Unreadable, read_bounded
from grn.runtime.locks import writer_of
from grn.weights.kinds import kind_of

DEPTH = 4  # of run folders below `paths.runs`; those of sweeps are at sweeps/<name>/<number>
MAX_FOLDERS = 20_000  # that are looked into
MAX_CONFIG, MAX_METRICS, MAX_CURVES = 2**21, 2**20, 2**26  # bytes
MAX_COLUMNS = 1000  # of curves
MAX_PICTURE = 2**25  # bytes
PICTURES = (".png", ".gif", ".webp", ".jpg", ".jpeg", ".mp4")
# Where runs, and what is made of their checkpoints, leave pictures; the first is what training draws.
FOLDERS_OF_PICTURES = ("pictures", "samples", "evaluation")
TAIL = 2**16  # bytes at the end of a curve file that tell its last step


@dataclass(frozen=True)
class Run:
    """A run folder as it is now.

    name: the folder as seen from `paths.runs`. kind: `refiner` (of classes), `text refiner`, `tokenizer`, or None where
    its config does not say. step: optimizer steps that were taken, as far as its curves and scores tell. max_steps:
    that are planned. writer: the process that writes there now, in words; None: none. checkpoint: the newest. scores:
    name -> value, of training and then of evaluation. updated: seconds since the epoch, of the newest curve or
    checkpoint. problems: a line for each file that cannot be read.
    """

    folder: Path
    name: str
    kind: str | None
    step: int | None
    max_steps: int | None
    writer: str | None
    checkpoint: Path | None
    scores: Mapping[str, float]
    updated: float
    problems: tuple[str, ...] = field(default=())

    @property
    def is_running(self) -> bool:
        return self.writer is not None


def find_runs(runs: str | Path) -> list[Run]:
    """All run folders in `paths.runs`, the one that was written last first; [] where there is no such folder."""
    root = Path(runs).expanduser()
    found = [read_run(folder, name=str(folder.relative_to(root))) for folder in _run_folders(root)]
    return sorted(found, key=lambda run: (-run.updated, run.name))


def read_run(folder: str | Path, *, name: str | None = None) -> Run:
    """One run folder.

    Args:
        name: None: the folder's own.
    """
    folder = Path(folder)
    config, scores, problems = {}, {}, []
    try:
        config = read_config(folder / "config.yaml")
    except Unreadable as error:
        problems.append(str(error))
    steps = []
    for path in (folder / "metrics.json", folder / "evaluation" / "metrics.json"):
        try:
            step, measured = read_metrics(path)
        except FileNotFoundError:
            continue
        except Unreadable as error:
            problems.append(str(error))
            continue
        scores |= measured
        steps.append(step)
    curve_files = _curve_files(folder)
    steps += [None if (last := _last_step(path)) is None else last + 1 for path in curve_files[-1:]]
    checkpoints = _checkpoints(folder)
    times = [_time(path) for path in (folder / "config.yaml", *curve_files[-1:], *checkpoints[-1:])]
    return Run(
        folder=folder,
        name=folder.name if name is None else name,
        kind=kind_of(config),
        step=max((step for step in steps if step is not None), default=None),
        max_steps=_count(_at(config, "trainer.max_steps")),
        writer=writer_of(folder),
        checkpoint=checkpoints[-1] if checkpoints else None,
        scores=scores,
        updated=max(times),
        problems=tuple(problems),
    )


def read_metrics(path: Path) -> tuple[int | None, dict[str, float]]:
    """(Step, name -> value) of a `metrics.json` of training or evaluation.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; the line says so.
    """
    try:
        content = json.loads(read_bounded(path, MAX_METRICS, follow=False))
        metrics = {str(name): float(value) for name, value in content["metrics"].items()}
        step = _count(content.get("step"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"{path} is damaged ({type(error).__name__})") from None
    return step, metrics


def read_curves(folder: str | Path, *, points: int = 1000) -> dict[str, list[tuple[int, float]]]:
    """The curves of a run by name: points (step, value), steps rising, from Lightning's CSV files.

    Each start of a run writes a file of its own: where one trains steps again that an earlier one has logged, its
    points take the place of those. Values that are not finite, and lines that are not numbers, are left out.

    Args:
        points: at most, of a curve: longer ones are thinned evenly, with the first and the last.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for path in _curve_files(Path(folder)):
        try:
            added = _curves_of(read_bounded(path, MAX_CURVES, follow=False).decode("utf-8", "replace"))
        except (Unreadable, FileNotFoundError, csv.Error):
            continue
        first = min((curve[0][0] for curve in added.values()), default=math.inf)
        curves = {name: [point for point in curve if point[0] < first] for name, curve in curves.items()}
        for name, curve in added.items():
            curves.setdefault(name, []).extend(curve)
    return {name: _thinned(curve, points) for name, curve in sorted(curves.items()) if curve}


def newest_pictures(folder: str | Path) -> dict[str, Path]:
    """What the pictures and films of a run show -> the newest file of each kind.

    Files of one name at several steps (`samples-step0001000.png`) are one kind. Links, hidden files, empty ones and
    those of more than `MAX_PICTURE` bytes are left out.
    """
    newest: dict[str, tuple[int, Path]] = {}
    for part in FOLDERS_OF_PICTURES:
        for path in _entries(Path(folder) / part):
            if path.suffix.lower() not in PICTURES or path.name.startswith(".") or not _is_picture(path):
                continue
            at = re.fullmatch(r"(.+)-step(\d{1,12})", path.stem)
            name, step = (at[1], int(at[2])) if at else (path.stem, 0)
            kind = f"{part}/{name}{path.suffix.lower()}"
            if kind not in newest or step > newest[kind][0]:
                newest[kind] = (step, path)
    return {kind: path for kind, (_, path) in newest.items()}


def _run_folders(root: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Folders with a run's config or checkpoints, wherever they are; what is in them is not looked into."""
    seen, waiting, looked = set(), [(root, 0)], 0
    while waiting and looked < MAX_FOLDERS:
        folder, level = waiting.pop(0)
        looked += 1
        real = os.path.realpath(folder)
        if real in seen:  # links may lead in circles
            continue
        seen.add(real)
        if level and ((folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir()):
            yield folder
        elif level < depth:
            waiting += [(it, level + 1) for it in _entries(folder) if not it.name.startswith(".") and it.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def read_config(path: Path) -> dict[str, Any]:
    """A run's resolved config, as plain containers; {} where there is none yet.

    Raises:
        ValueError: it is damaged; the line says so.
    """
    try:
        content = yaml.load(read_bounded(path, MAX_CONFIG, follow=False).decode("utf-8", "replace"), _Loader)
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        raise Unreadable(f"{path} is damaged ({type(error).__name__})") from None
    except ValueError as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"{path} is damaged ({type(error).__name__})") from None
    return content if isinstance(content, dict) else {}


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML has it


def _at(config: Any, key: str) -> Any:
    """A value of nested containers; None where there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None


def _curve_files(folder: Path) -> list[Path]:
    """Lightning's, in the order of the run's starts."""
    versions = {}
    for path in _entries(folder / "csv"):
        if at := re.fullmatch(r"version_(\d{1,9})", path.name):
            versions[int(at[1])] = path / "metrics.csv"
    return [path for _, path in sorted(versions.items()) if path.is_file() and not path.is_symlink()]


def _curves_of(text: str) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    rows = csv.reader(text.splitlines())
    names = next(rows, [])[:MAX_COLUMNS]
    if "step" not in names:
        return {}
    place = names.index("step")
    for row in rows:
        if len(row) <= place or not row[place].isdecimal() or len(row[place]) > 12:
            continue
        step = int(row[place])
        for name, text in zip(names, row):
            if name in ("step", "epoch") or (value := _finite(text)) is None:
                continue
            curve = curves.setdefault(name, [])
            if not curve or step > curve[-1][0]:
                curve.append((step, value))
            elif step == curve[-1][0]:
                curve[-1] = (step, value)
    return curves


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _thinned(curve: list[tuple[int, float]], points: int) -> list[tuple[int, float]]:
    if len(curve) <= points:
        return curve
    return [curve[round(number * (len(curve) - 1) / (points - 1))] for number in range(points)]


def _last_step(path: Path) -> int | None:
    """Of a curve file, by its head and its tail alone."""
    try:
        with open(path, "rb") as file:
            head = file.readline(TAIL).decode("utf-8", "replace")
            start = max(file.tell(), file.seek(0, os.SEEK_END) - TAIL)
            file.seek(start)
            lines = file.read(TAIL).decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    place = head.rstrip("\r\n").split(",").index("step") if "step" in head.rstrip("\r\n").split(",") else None
    if place is None:
        return None
    steps = [row[place] for row in (line.split(",") for line in lines) if len(row) > place]
    return max((int(step) for step in steps if step.isdecimal() and len(step) <= 12), default=None)


def _checkpoints(folder: Path) -> list[Path]:
    """Files, or folders of sharded ones, the oldest first."""
    found = [path for path in _entries(folder / "checkpoints") if path.suffix == ".ckpt" and path.name[0] != "."]
    return sorted((path for path in found if path.exists()), key=lambda path: (_time(path), path.name))


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _is_picture(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and 0 < found.st_size <= MAX_PICTURE
