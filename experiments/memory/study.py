"""Quality against steps, of steps that draw all tokens anew and of steps that go on from what is there (README.md).

    python experiments/memory/study.py [--digits runs/digits_c2i] [--critters experiments/critters/model] [--part 1/1]

from where the data are (pip install -e '.[studies]'). Each point is one `grn.evaluate`; what runs/memory holds is not
measured again, so that several of these, each with a part of the points, and then one of all write the table and plots.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import pandas as pd
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure

import grn.cli.entry  # noqa: F401  its resolvers
from grn.cli.entry import CONF
from grn.evaluation.evaluate import evaluate
from grn.runtime.files import write_json
from grn.studies.plots import error_bars, log_x
from grn.studies.results import Column, markdown, over_seeds, read_points, write_csv
from grn.studies.study import folder_of, missing, run_study

HERE = Path(__file__).parent
OUT = folder_of("memory")
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


POINTS = (
    *(Point("digits", 1.0, 1.0, n, *way) for n in STEPS for way in (REDRAW, REVERSE)),
    *(Point("critters", 2.0, 1.0, n, *way) for n in (8, 50) for way in (REDRAW, REVERSE)),
    *(Point("digits", 1.5, 1.0, n, *way) for n in (8, 50) for way in (REDRAW, REVERSE)),
    Point("digits", 1.0, 1.0, 50, "psi", 0.9),
)
KAPPAS = (1.0, 0.9)
MEASURED = {
    "accuracy": {"digits": "judge_accuracy", "critters": "attribute_accuracy"},
    "fid": {"digits": "fid", "critters": "critters_fid"},
}


def measure(points: tuple[Point, ...], ckpts: dict[str, str]) -> None:
    """Leaves `<point>-<seed>.json` of every point and seed in OUT."""
    for (point, seed), path in missing(product(points, SEEDS), lambda it, seed: OUT / f"{it.name}-{seed}.json"):
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


def tabulate() -> pd.DataFrame:
    """Writes results.csv, prints it as a table; a row a point that was measured, over its seeds."""
    by = ("model", "guidance", "temperature", "steps", "update", "kappa")
    points = read_points(OUT, by, ("cpu_seconds",), order={"kappa": KAPPAS})
    seconds = points.cpu_seconds.sum()
    points["cpu_seconds"] = points.groupby(list(by)).cpu_seconds.transform("sum")
    for column, names in MEASURED.items():
        points[column] = [row[names[row["model"]]] for row in points.to_dict("records")]
    table = over_seeds(points, by, ("cpu_seconds", *MEASURED)).drop(columns="cpu_seconds_error")
    errors = [column for column in table if column.endswith("_error")]
    write_csv(table.fillna(dict.fromkeys(errors, 0.0)), HERE / "results.csv")  # the error of one seed
    table["way"] = [f"psi, κ = {row.kappa:g}" if row.update == "psi" else "redraw" for row in table.itertuples()]
    columns = [Column(name) for name in ("model", "guidance", "steps")]
    columns += [Column("way", "update"), Column("seeds"), Column("accuracy", None, 100, ".1f", " %")]
    print(markdown(table, [*columns, Column("fid", "FID", spec=".1f")]))
    print("CPU minutes:", round(seconds / 60))
    return table


def plot(table: pd.DataFrame) -> None:
    """steps.png: accuracy and FID by steps, with standard errors over seeds, at temperature 1."""
    names = {"redraw": "draws all anew", "psi": "reverse step (psi, κ = 1)"}
    table = table.assign(told=table["update"].map(names))
    panels = {(model, guidance): rows for (model, guidance), rows in table.groupby(["model", "guidance"])}
    wanted = [("digits", 1.0), ("digits", 1.5), ("critters", 2.0)]
    wanted = [panel for panel in wanted if panel in panels and panels[panel].steps.nunique() > 1]
    figure = Figure((3.6 * len(wanted) + 0.4, 6), layout="constrained")
    axes = figure.subplots(2, len(wanted), squeeze=False)
    for column, panel in enumerate(wanted):
        own = panels[panel].query("temperature == 1 and kappa == 1")
        for axis, (key, label) in zip(axes[:, column], (("accuracy", "judge's accuracy"), ("fid", "FID"))):
            error_bars(axis, own, "steps", key, "told", dict(zip(names.values(), ("o-C0", "s-C3"))))
            log_x(axis, STEPS)
            axis.set(xlabel="steps", ylabel=label)
        axes[0, column].set_title(f"{panel[0]}, guidance {panel[1]}")
    axes[0, 0].legend()
    figure.savefig(HERE / "steps.png", dpi=100)


def main() -> None:
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
    run_study(main)
