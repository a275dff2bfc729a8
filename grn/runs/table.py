"""The table of `grn ls`."""

import json
import math
import time
from pathlib import Path

from grn.metrics.headlines import headlines
from grn.runs.listing import Run, find_runs, newest_pictures
from grn.runtime.errors import UserError
from grn.runtime.tables import show

SCORES = 2  # of a run, in its row
UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def show_runs(folder: str, *, as_json: bool) -> None:
    """Prints the runs in a folder, the one that was written last first.

    Raises:
        UserError: there is no such folder.
    """
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"folder={folder}: there is no such folder; runs are in runs/, or where GRN_RUNS says")
    runs = find_runs(folder)
    if as_json:
        print(json.dumps([as_plain(run) for run in runs], indent=2))
        return
    from rich.table import Table

    table = Table("run", "kind", "step", "scores", "written", "picture")
    for run in runs:
        table.add_row(*row_of(run))
    show(table) if runs else print(f"no runs in {folder}")
    for run in runs:
        for problem in run.problems:
            print(problem)


def as_plain(run: Run) -> dict[str, object]:
    """What a program would want to know of a run, for JSON."""
    picture = _picture(run)
    return {
        "run": run.name,
        "folder": str(run.folder),
        "kind": run.kind,
        "step": run.step,
        "max_steps": run.max_steps,
        "running": run.writer,
        "checkpoint": None if run.checkpoint is None else str(run.checkpoint),
        "scores": {name: value for name, value in run.scores.items() if math.isfinite(value)},
        "updated": run.updated,
        "picture": None if picture is None else str(picture),
        "problems": list(run.problems),
    }


def row_of(run: Run) -> tuple[str, ...]:
    """The cells of a run, as text."""
    step = "" if run.step is None else str(run.step)
    if run.max_steps is not None and run.step != run.max_steps:
        step += f"/{run.max_steps}"
    scores = {name: value for name, value in run.scores.items() if math.isfinite(value)}
    shown = list(headlines(scores).items())[:SCORES]
    picture = _picture(run)
    return (
        run.name,
        run.kind or "",
        step,
        ", ".join(f"{name} {value}" for name, value in shown),
        "now" if run.is_running else _age(time.time() - run.updated),
        "" if picture is None else str(picture.relative_to(run.folder)),
    )


def _picture(run: Run) -> Path | None:
    return next(iter(newest_pictures(run.folder).values()), None)


def _age(seconds: float) -> str:
    unit, size = next(((unit, size) for unit, size in UNITS if seconds >= size), UNITS[-1])
    return f"{max(0, round(seconds / size))} {unit} ago"
