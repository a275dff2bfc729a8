"""Tables of sweeps, and the metric that sorts them."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from grn.runtime.errors import UserError
from grn.runtime.files import write_json, write_text
from grn.runtime.ranks import place
from grn.runtime.tables import show

# What `monitor: null` means: the first of these that was measured.
MONITORED = ("eval/fid", "fid", "rfid", "val/psnr", "psnr", "val/loss")
LARGER_IS_BETTER = ("psnr", "ssim", "isc", "accuracy", "precision", "recall")  # or a part of the metric's name


@dataclass(frozen=True)
class Failed:
    """What a point of a sweep returns that failed, so that the others go on; `reason` in one line."""

    reason: str


def objective(metrics: Mapping[str, float], monitor: str | Sequence[str] | None) -> float | list[float] | None:
    """The metric that `monitor` names, which entry points return for sweepers; of several, a list. None where
    nothing is monitored.

    Raises:
        UserError: it was not measured.
    """
    if monitor is not None and not isinstance(monitor, str):
        return [_value(metrics, name) for name in monitor]
    name = _monitored(metrics, monitor)
    return None if name is None else _value(metrics, name)


def _value(metrics: Mapping[str, float], name: str) -> float:
    if name not in metrics:
        raise UserError(f"monitor={name} was not measured; there is {', '.join(sorted(metrics))}")
    return float(metrics[name])


class SweepTable(Callback):
    """A sweep's points with what was set for each and its `metrics.json`, the best first: `table.csv` in its folder.

    Whichever point ends writes it anew, in a job of its own, too; at the end it is printed, by `monitor` alone. Of
    points that are of several training steps, `curve.png` shows `monitor` against steps; of each number that was swept,
    `curve-<key>.png` shows it against that, a line for each setting of all else, the best marked.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        searches = "study_name" in config.hydra.get("sweeper", {})
        goes_on = searches and not config.get("overwrite")
        if place()[0] == 0 and not config.get("cluster", {}).get("dry_run") and not goes_on:
            for earlier in Path(config.hydra.sweep.dir).glob("*/point.json"):
                earlier.unlink()

    def on_job_end(self, config: DictConfig, job_return: JobReturn | None = None, **_: Any) -> None:
        folder = Path(config.hydra.runtime.output_dir)
        of_a_sweep = config.hydra.mode == RunMode.MULTIRUN and config.hydra.sweep.subdir != "."  # else a single job's
        failed = getattr(job_return, "_return_value", None)
        failed = failed.reason if isinstance(failed, Failed) else None
        if not of_a_sweep or place()[0] > 0 or not (failed or (folder / "metrics.json").exists()):
            return
        overrides: dict[str, Any] = dict(
            override.split("=", 1) for override in config.hydra.overrides.task if "=" in override
        )
        if failed is None:
            measured = json.loads((folder / "metrics.json").read_text())
            point = {"overrides": overrides, "step": measured.get("step"), "metrics": measured["metrics"]}
        else:
            point = {"overrides": overrides, "step": None, "metrics": {}, "failed": failed}
        write_json(folder / "point.json", point)
        rows = table(folder.parent, config.monitor)[0]
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(folder.parent / "table.csv", text.getvalue())

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        rows, columns = table(Path(config.hydra.sweep.dir), config.monitor)
        if not rows or place()[0] > 0:
            return
        from rich.table import Table

        printed = Table(title=str(Path(config.hydra.sweep.dir) / "table.csv"))
        for column in columns:
            printed.add_column(column)
        for row in rows:
            printed.add_row(*(_short(row.get(column)) for column in columns))
        show(printed)
        monitored = _monitored(rows[0], config.monitor)
        drawn: dict[str, Any] = {"table": rows}
        for key in columns[1:]:
            curves = _curves(rows, columns, key, monitored)
            if key in (monitored, "failed") or not any(len(points) > 1 for points in curves.values()):
                continue
            from grn.media import pictures

            path = Path(config.hydra.sweep.dir) / ("curve.png" if key == "step" else f"curve-{key}.png")
            title = f"{monitored} by {'steps of training' if key == 'step' else key}"
            number = _number(rows[0][key])
            best = None if number is None or monitored is None else (number, float(rows[0][monitored]))
            pictures.save(pictures.curve_chart(title, curves, best), path)
            print(f"drawn: {path}")
            drawn[path.stem] = path
        _log_to_run(config, drawn)


def _log_to_run(config: DictConfig, drawn: Mapping[str, Any]) -> None:
    """The table and the curves of evaluations of one checkpoint, to the W&B run that trained it."""
    files = {json.loads(path.read_text()).get("ckpt") for path in Path(config.hydra.sweep.dir).glob("*/metrics.json")}
    if not config.get("wandb") or len(files) != 1 or (ckpt := files.pop()) is None:
        return
    from grn.runs.wandb_runs import log_results
    from grn.runtime.wandb_login import wandb_offline

    log_results(ckpt, {f"sweep/{name}": value for name, value in drawn.items()}, step=None, offline=wandb_offline())


def _curves(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], key: str, monitored: str | None
) -> dict[str, list[tuple[float, float]]]:
    """`monitored` against the numbers of `key`, a curve for each setting of all else that was swept."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if monitored is not None and monitored in row and (number := _number(row.get(key))) is not None:
            curves.setdefault(_apart(row, columns, key, monitored), []).append((number, float(row[monitored])))
    return curves


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _apart(row: Mapping[str, Any], columns: Sequence[str], key: str, monitored: str | None) -> str:
    """What tells a point's curve from others: all that was swept beside `key`; against steps, of checkpoints only their
    folder."""
    swept = [column for column in columns[1:] if column not in (key, "step", monitored)]
    values = {name: row.get(name) for name in swept}
    if key == "step" and "ckpt" in values:
        values["ckpt"] = str(Path(str(values["ckpt"])).parent)
    return ", ".join(f"{name}={value}" for name, value in values.items())


def table(folder: Path, monitor: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, the best first; the columns that tell them apart) of the points in `folder` that have ended."""
    points = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/point.json")}
    metrics = {name: value for point in points.values() for name, value in point["metrics"].items()}
    monitored = _monitored(metrics, monitor)
    settings = dict.fromkeys(key for point in points.values() for key in point["overrides"])
    swept = [key for key in settings if len({point["overrides"].get(key) for point in points.values()}) > 1]
    steps = {name: {"step": point["step"]} for name, point in points.items() if point.get("step") is not None}
    if len({step for of_point in steps.values() for step in of_point.values()}) < 2:
        steps = {}
    rows = [
        {
            "point": name,
            **{key: point["overrides"].get(key) for key in swept},
            **steps.get(name, {}),
            **point["metrics"],
            **({"failed": point["failed"]} if "failed" in point else {}),
        }
        for name, point in sorted(points.items())
    ]
    sign = -1 if any(part in str(monitored) for part in LARGER_IS_BETTER) else 1
    rows.sort(key=lambda row: (monitored not in row, sign * row.get(monitored, 0)))
    failed = ["failed"] if any("failed" in row for row in rows) else []
    return rows, ["point", *swept, *(["step"] if steps else []), *([monitored] if monitored else []), *failed]


def _short(value: Any) -> str:
    if value is None:
        return ""
    try:
        return f"{float(value):.6g}"
    except (TypeError, ValueError):
        return str(value)


def _monitored(metrics: Mapping[str, float], monitor: str | Sequence[str] | None) -> str | None:
    if monitor is not None and not isinstance(monitor, str):
        return monitor[0]  # of several goals
    return monitor or next((name for name in MONITORED if name in metrics), None)
