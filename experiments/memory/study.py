"""Quality against steps, of steps that draw all tokens anew and of steps that go on from what is there (README.md).

    python experiments/memory/study.py [--digits runs/digits_c2i] [--critters experiments/critters/model] [--part 1/1]

from where the data are (pip install -e '.[studies]'). Each point is one `grn.evaluate`; what runs/memory holds is not
measured again, so that several of these, each with a part of the points, and then one of all write the table and plots.
"""

import argparse
import csv
import json
import logging
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
from hydra import compose, initialize_config_dir

import grn.cli.entry  # noqa: F401  its resolvers
from grn.cli.entry import CONF
from grn.evaluation.evaluate import evaluate
from grn.runtime.files import write_json

matplotlib.use("agg")
from matplotlib import pyplot as plt

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
OUT = Path(os.environ.get("GRN_RUNS", "runs")) / "memory"
SEEDS = (1, 2, 3)
STEPS = (5, 8, 20, 50)
NUM = 500  # of digits; of critters it is the suite's 200 prompts
REDRAW, REVERSE = ("redraw", 1.0), ("psi", 1.0)


@dataclass(frozen=True)
class Point:
    """What is drawn; `update` and `kappa` as in grn.method.psi."""

    model: str
    guidance: float
    temperature: float
    steps: int
    update: str
    kappa: float

    @property
    def name(self) -> str:
        return "-".join(map(str, asdict(self).values()))

    @property
    def way(self) -> str:
        return "redraw" if self.update == "redraw" else f"psi, κ = {self.kappa:g}"


POINTS = (
    *(Point("digits", 1.0, 1.0, n, *way) for n in STEPS for way in (REDRAW, REVERSE)),
    *(Point("critters", 2.0, 1.0, n, *way) for n in (8, 50) for way in (REDRAW, REVERSE)),
    *(Point("digits", 1.5, 1.0, n, *way) for n in (8, 50) for way in (REDRAW, REVERSE)),
    Point("digits", 1.0, 1.0, 50, "psi", 0.9),
)
MEASURED = {"digits": ("judge_accuracy", "fid"), "critters": ("attribute_accuracy", "critters_fid")}


def measure(points: tuple[Point, ...], ckpts: dict[str, str]) -> None:
    """Leaves `<point>-<seed>.json` of every point and seed in OUT."""
    for point in points:
        for seed in SEEDS:
            path = OUT / f"{point.name}-{seed}.json"
            if path.exists():
                continue
            sampler = ["sampler=linear", f"sampler.schedule.steps={point.steps}", f"sampler.guidance={point.guidance}"]
            sampler += [f"sampler.temperature={point.temperature}", f"sampler.update={point.update}"]
            sampler += [f"sampler.kappa={point.kappa}"]
            asked = {
                "digits": [f"num={NUM}"],
                "critters": ["suite=critters", "suite.samples=1", "data=critters_t2i", "scores=none"],
            }[point.model]
            folder = OUT / "evaluations" / path.stem
            given = [f"ckpt={ckpts[point.model]}", f"out={folder}", f"seed={seed}", "wandb=false", "overwrite=true"]
            with initialize_config_dir(str(CONF), version_base="1.3"):
                config = compose("evaluate", [*given, *asked, *sampler])
            started = time.process_time()
            metrics = evaluate(config)
            write_json(path, asdict(point) | {"seed": seed, "cpu_seconds": time.process_time() - started} | metrics)


def tabulate() -> list[dict]:
    """Writes results.csv, prints it as a table, and returns its rows: a row a point that was measured, with means and
    standard errors over its seeds (none of one)."""
    rows = []
    for point in POINTS:
        files = [OUT / f"{point.name}-{seed}.json" for seed in SEEDS]
        found = [json.loads(path.read_text()) for path in files if path.is_file()]
        if not found:
            continue
        row = asdict(point) | {"seeds": len(found), "cpu_seconds": sum(run["cpu_seconds"] for run in found)}
        for column, metric in zip(("accuracy", "fid"), MEASURED[point.model]):
            values = [run[metric] for run in found]
            row[column] = statistics.mean(values)
            row[f"{column}_error"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        rows.append(row)
    rows.sort(key=lambda row: (row["model"], row["guidance"], row["temperature"], row["steps"], row["update"]))
    with open(HERE / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    print("| model | guidance | steps | update | seeds | accuracy | FID |\n|---|---|---|---|---|---|---|")
    for row in rows:
        way = Point(**{name: row[name] for name in Point.__dataclass_fields__}).way
        print(
            f"| {row['model']} | {row['guidance']} | {row['steps']} | {way} | {row['seeds']} "
            f"| {_told(100 * row['accuracy'], 100 * row['accuracy_error'], row['seeds'])} % "
            f"| {_told(row['fid'], row['fid_error'], row['seeds'])} |"
        )
    print("CPU minutes:", round(sum(row["cpu_seconds"] for row in rows) / 60))
    return rows


def _told(value: float, error: float, seeds: int) -> str:
    return f"{value:.1f}" if seeds == 1 else f"{value:.1f} ± {error:.1f}"


def plot(rows: list[dict]) -> None:
    """steps.png: accuracy and FID by steps, with standard errors over seeds, at temperature 1."""
    panels = [("digits", 1.0), ("digits", 1.5), ("critters", 2.0)]
    steps = {panel: {row["steps"] for row in rows if (row["model"], row["guidance"]) == panel} for panel in panels}
    panels = [panel for panel in panels if len(steps[panel]) > 1]
    size = (3.6 * len(panels) + 0.4, 6)
    figure, axes = plt.subplots(2, len(panels), figsize=size, layout="constrained", squeeze=False)
    for column, (model, guidance) in enumerate(panels):
        for axis, key in zip(axes[:, column], ("accuracy", "fid")):
            for update, style in (("redraw", "o-C0"), ("psi", "s-C3")):
                points = [
                    row
                    for row in rows
                    if (row["model"], row["guidance"], row["update"]) == (model, guidance, update)
                    and row["temperature"] == row["kappa"] == 1.0
                ]
                values, errors = [row[key] for row in points], [row[f"{key}_error"] for row in points]
                label = "draws all anew" if update == "redraw" else "reverse step (psi, κ = 1)"
                axis.errorbar([row["steps"] for row in points], values, errors, fmt=style, capsize=2, label=label)
            axis.set(xscale="log", xlabel="steps", ylabel={"accuracy": "judge's accuracy", "fid": "FID"}[key])
            axis.set_xticks(STEPS, STEPS)
            axis.minorticks_off()
        axes[0, column].set_title(f"{model}, guidance {guidance}")
    axes[0, 0].legend()
    figure.savefig(HERE / "steps.png", dpi=100)
    plt.close(figure)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser()
    parser.add_argument("--digits", default="runs/digits_c2i")
    parser.add_argument("--critters", default="experiments/critters/model")
    parser.add_argument("--part", default="1/1", help="which of how many parts of the points to measure")
    parser.add_argument("--tabulate", action="store_true", help="measure nothing more")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    if not arguments.tabulate:
        measure(POINTS[part - 1 :: parts], {"digits": arguments.digits, "critters": arguments.critters})
    if parts == 1:
        plot(tabulate())


if __name__ == "__main__":
    main()
