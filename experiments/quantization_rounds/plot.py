"""The table and the figure of this study (pip install -e '.[studies]').

    python experiments/quantization_rounds/plot.py

from where the runs of its README's commands are, after these.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from grn.runtime.errors import UserError
from grn.studies.results import Column, markdown, write_csv
from grn.studies.study import folder_of, run_study

HERE = Path(__file__).parent
SWEEP = folder_of("sweeps") / "quantization_rounds"
COLUMNS = ["rounds", "bits_per_image", "bound", "error_max", "error", "bit_entropy", "psnr", "ssim", "rfid"]


def tabulate() -> pd.DataFrame:
    """Writes results.csv, prints it as a table; a row a trained point, by its number of rounds M, of which `error`s and
    `bit_entropy` are.

    Raises:
        UserError: no point of the sweep was evaluated.
    """
    found = []
    for path in SWEEP.glob("*/evaluation/metrics.json"):
        rounds = OmegaConf.load(path.parents[1] / "config.yaml").model.rounds
        metrics = json.loads(path.read_text())["metrics"]
        row = {"rounds": rounds, "bound": 2.0**-rounds}
        row |= {name: metrics[f"{name}_{rounds}"] for name in ("error_max", "error", "bit_entropy")}
        found.append(row | {name: metrics[name] for name in ("bits_per_image", "psnr", "ssim", "rfid")})
    if not found:
        raise UserError(f"{SWEEP} has no points that were evaluated: run the README's commands before")
    table = pd.DataFrame(found)[COLUMNS].sort_values("rounds")
    write_csv(table, HERE / "results.csv", float_format=None)
    print(markdown(table, [Column(name, spec=".4g") for name in COLUMNS]))
    return table


def plot(table: pd.DataFrame) -> None:
    """rounds.png: the errors that the rounds leave; PSNR and rFID by bits."""
    figure = Figure((10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy("rounds", "bound", "-", data=table, color="0.8", linewidth=7, label="bound $2^{-M}$")
    left.semilogy("rounds", "error_max", "o-", data=table, label="largest")
    left.semilogy("rounds", "error", "s-", data=table, label="mean")
    left.set(xlabel="rounds M", ylabel="error left, |z - q|", title="features of held-out digits")
    left.legend()
    right.plot("bits_per_image", "psnr", "o-", data=table, color="C0")
    right.set(xlabel="bits per image", title="reconstructions of held-out digits")
    right.set_ylabel("PSNR, dB", color="C0")
    rfid = right.twinx()
    rfid.plot("bits_per_image", "rfid", "s-", data=table, color="C3")
    rfid.set_ylabel("rFID", color="C3")
    rfid.set_ylim(0, 1)
    right.set_ylim(27, 42)
    for rounds, x, y in zip(table.rounds, table.bits_per_image, table.psnr):
        right.annotate(f"M={rounds}", (x, y), xytext=(0, 7), textcoords="offset points", ha="center")
    figure.savefig(HERE / "rounds.png", dpi=110)


def main() -> None:
    argparse.ArgumentParser(
        description="The table and the figure, from the runs of the README's commands."
    ).parse_args()
    plot(tabulate())


if __name__ == "__main__":
    run_study(main)
