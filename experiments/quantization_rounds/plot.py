"""The table and the figure of this study, from the runs of its README's commands (pip install -e '.[studies]')."""

import csv
import json
import os
from pathlib import Path

import matplotlib
from omegaconf import OmegaConf

matplotlib.use("agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
SWEEP = Path(os.environ.get("GRN_RUNS", "runs")) / "sweeps" / "quantization_rounds"
COLUMNS = ("rounds", "bits_per_image", "bound", "error_max", "error", "bit_entropy", "psnr", "ssim", "rfid")


def rows() -> list[dict[str, float]]:
    """One of each trained point, by its number of rounds M; `error`s and `bit_entropy` are those of round M."""
    found = []
    for path in SWEEP.glob("*/evaluation/metrics.json"):
        rounds = OmegaConf.load(path.parents[1] / "config.yaml").model.rounds
        metrics = json.loads(path.read_text())["metrics"]
        row = {"rounds": rounds, "bound": 2.0**-rounds}
        row |= {name: metrics[f"{name}_{rounds}"] for name in ("error_max", "error", "bit_entropy")}
        found.append(row | {name: metrics[name] for name in ("bits_per_image", "psnr", "ssim", "rfid")})
    return sorted(found, key=lambda row: row["rounds"])


def main() -> None:
    table = rows()
    with open(HERE / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(table)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for row in table:
        print("| " + " | ".join(f"{row[name]:.4g}" for name in COLUMNS) + " |")

    rounds = [row["rounds"] for row in table]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.semilogy(rounds, [row["bound"] for row in table], "-", color="0.8", linewidth=7, label="bound $2^{-M}$")
    left.semilogy(rounds, [row["error_max"] for row in table], "o-", label="largest")
    left.semilogy(rounds, [row["error"] for row in table], "s-", label="mean")
    left.set(xlabel="rounds M", ylabel="error left, |z - q|", title="features of held-out digits")
    left.legend()
    bits = [row["bits_per_image"] for row in table]
    right.plot(bits, [row["psnr"] for row in table], "o-", color="C0")
    right.set(xlabel="bits per image", title="reconstructions of held-out digits")
    right.set_ylabel("PSNR, dB", color="C0")
    rfid = right.twinx()
    rfid.plot(bits, [row["rfid"] for row in table], "s-", color="C3")
    rfid.set_ylabel("rFID", color="C3")
    rfid.set_ylim(0, 1)
    right.set_ylim(27, 42)
    for x, row in zip(bits, table):
        right.annotate(f"M={row['rounds']}", (x, row["psnr"]), xytext=(0, 7), textcoords="offset points", ha="center")
    figure.savefig(HERE / "rounds.png", dpi=110)


if __name__ == "__main__":
    main()
