"""One token of 2^M classes a channel against M binary tokens, at the same network and steps, on digits (README.md).

    python experiments/labelings/study.py [--settings 4x4 1x4] [--labelings ind bit] [--seeds 1 2 3]

from where the data are (pip install -e '.[studies]'). What runs/labelings holds is neither trained nor measured again,
so that several of these, each with a part of the settings, and then one of all write the table and plot.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from torch import Tensor

import grn.cli.entry  # noqa: F401  its resolvers
from grn.checkpoints.native import load_tokenizer, read_checkpoint
from grn.evaluation.scoring import real_splits
from grn.media.pixels import from_uint8, to_uint8
from grn.method import corruption, hbq
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.metrics.fid import GenerationScores
from grn.networks.class_refiner import ClassRefiner
from grn.runtime.files import write_json
from grn.studies.class_refiners import RATIO, draw, train
from grn.studies.plots import error_bars
from grn.studies.results import Column, markdown, over_seeds, read_points, write_csv
from grn.studies.study import folder_of, missing, run_study
from grn.toys.digits_classifier import digits_classifier_weights
from grn.toys.judge import DigitsJudge

HERE = Path(__file__).parent
OUT = folder_of("labelings")
SETTINGS = ("4x4", "2x4", "6x4", "1x4", "4x2", "4x8")  # rounds M x channels of the tokenizer
# The network of digits_c2i, and half as many steps.
NETWORK = {"num_labels": 10, "size": 8, "depth": 4, "width": 128, "heads": 4, "bottleneck": 64}
NETWORK |= {"context_start": 2, "context_tokens": 4, "mlp_ratio": 3.0}
STEPS, NUM, SAMPLED = 450, 500, (8, 20)  # NUM samples, by 8 and by 20 steps
# Signal ratios at the middles of eighths of training's distribution: the mean over them stands for it.
RATIOS = torch.sigmoid(RATIO["mean"] + RATIO["std"] * torch.special.ndtri((torch.arange(8) + 0.5) / 8)).tolist()


def tokenizer_of(setting: str) -> Path:
    """The run folder of a setting's tokenizer, which is trained (seed 0) if missing."""
    rounds, channels = setting.split("x")
    run = OUT / f"tokenizer-{rounds}-{channels}"
    if not (run / "metrics.json").is_file():
        given = ["+experiment=digits_tokenizer", f"model.rounds={rounds}", f"model.latent_channels={channels}"]
        given += [f"name=labelings/{run.name}", "logger=csv", "scores=none", "overwrite=true"]
        subprocess.run([sys.executable, "-m", "grn.train", *given], check=True)
    return run


@torch.no_grad()
def held_out_bits(network: ClassRefiner, tokens: Tensor, labels: Tensor, t: float) -> float:
    """Cross-entropy of all of a picture's tokens from a map of signal ratio t, in bits, the mean over pictures."""
    ids, ratios = torch.arange(len(tokens)), torch.full((len(tokens),), t)
    noisy = corruption.corrupt(tokens, ratios, network.classes, seed=0, ids=ids, step=round(1e6 * t))
    parts = zip(*(it.split(100) for it in (noisy, ratios, labels, tokens)))
    nats = sum(corruption.token_loss(network(*given), true).item() * len(true) for *given, true in parts)
    return nats / len(tokens) * tokens[0].numel() / math.log(2)


@torch.no_grad()
def measure(setting: str, labelings: list[str], seeds: list[int]) -> None:
    """Leaves `<setting>-<labeling>-<seed>.json` in OUT, and `<setting>.json` of the tokenizer alone."""
    rounds, channels = map(int, setting.split("x"))
    labelings = ["ind"] if rounds == 1 else labelings  # of one round, both are the same
    points = [(one, seed) for seed in seeds for one in labelings]

    def path_of(labeling: str, seed: int) -> Path:
        return OUT / f"{setting}-{labeling}-{seed}.json"

    if not any(missing(points, path_of)):
        return
    run = tokenizer_of(setting)
    tokenizer = load_tokenizer(run)[0].eval()
    splits = real_splits(instantiate(read_checkpoint(run).config.data))
    batches = {name: list(split()) for name, split in splits.items()}
    pixels, labels = ({n: torch.cat([it[key] for it in b]) for n, b in batches.items()} for key in ("pixels", "label"))
    given = {"reference": "train", "extractor": "digits-classifier", "weights": digits_classifier_weights, "isc": False}
    fid, judge = GenerationScores(**splits, cache_dir=OUT, **given), DigitsJudge(**splits)

    def scores(images: Tensor, asked: Tensor) -> dict[str, float]:
        for score in (fid, judge):
            score.reset()
            score.update(images[:, :, 0], asked)
        return {"fid": fid.compute()["fid"], "accuracy": judge.compute()["judge_accuracy"]}

    features = {name: tokenizer.encode(from_uint8(images)) for name, images in pixels.items()}
    restored = to_uint8(tokenizer.decode(hbq.quantize(features["val"], rounds)))
    write_json(OUT / f"{setting}.json", scores(restored, labels["val"]))
    asked = torch.arange(NUM) % NETWORK["num_labels"]
    for (labeling, seed), path in missing(points, path_of):
        torch.manual_seed(seed)
        size, classes = hbq.num_tokens(channels, rounds, labeling)
        network = ClassRefiner(channels=size, classes=classes, **NETWORK)
        tokens, held_out = (hbq.tokens(features[name], rounds, labeling) for name in ("train", "val"))
        row, started = {"rounds": rounds, "channels": channels, "labeling": labeling, "seed": seed}, time.process_time()
        network = train(network, tokens, labels["train"], steps=STEPS, seed=seed)
        row["cpu_seconds"] = time.process_time() - started
        row["parameters"] = sum(parameter.numel() for parameter in network.parameters())
        row["bits_from_noise"], *bits = (held_out_bits(network, held_out, labels["val"], t) for t in (0.0, *RATIOS))
        row["bits"] = statistics.mean(bits)
        for steps in SAMPLED:
            images = to_uint8(tokenizer.detokenize(draw(network, asked, Sampler(Linear(steps)), seed), labeling))
            row |= {f"{name}_{steps}": value for name, value in scores(images, asked).items()}
        write_json(path, row)
        print(json.dumps(row), flush=True)


MEASURES = {"bits": (1, 0), "bits_from_noise": (1, 0)}  # by what a column is multiplied in the table, and its decimals
MEASURES |= {f"{name}_{steps}": it for steps in SAMPLED for name, it in (("accuracy", (100, 1)), ("fid", (1, 1)))}
MEASURES |= {"cpu_seconds": (1, 0)}


def tabulate() -> pd.DataFrame:
    """Writes results.csv, prints it as a table; a row a setting and labeling, with standard errors over seeds."""
    by, order = ("rounds", "channels", "labeling"), {"labeling": ("ind", "bit")}
    points = read_points(OUT, by, ("parameters", *MEASURES), order=order, pattern="*-*-*.json")
    table = over_seeds(points, (*by, "parameters"), list(MEASURES))
    settings = zip(table.rounds, table.channels)
    table["tokenizer_fid"] = [read_points(OUT, (), ("fid",), pattern=f"{m}x{d}.json").fid[0] for m, d in settings]
    table["parameters"] = table.pop("parameters")  # comes last
    write_csv(table, HERE / "results.csv")
    columns = [Column("rounds", "M"), Column("channels"), Column("labeling"), Column("seeds")]
    columns += [Column(name, None, scale, f".{decimals}f") for name, (scale, decimals) in MEASURES.items()]
    print(markdown(table, columns))
    return table


def plot(table: pd.DataFrame) -> None:
    """labelings.png: bits, accuracy and FID by rounds, of 4 channels; bars are standard errors over seeds."""
    figure = Figure((11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = {"bits": "held-out bits a picture", "accuracy": "read as asked for", "fid": "FID"}
    for axis, (measured, title) in zip(axes, panels.items()):
        names = [name for name in MEASURES if name.startswith(measured) and name != "bits_from_noise"]
        for labeling, color in (("ind", "C0"), ("bit", "C3")):
            own = table[(table.labeling == labeling) | (table.rounds == 1)]
            for name, style in zip(names, ("o-", "s--")):
                told = f"{labeling}, {name.split('_')[1]} steps" if "_" in name else labeling
                error_bars(axis, own, "rounds", name, "channels", {4: style}, color=color, label=told)
        axis.set(xlabel="rounds M", ylabel=title)
        axis.legend(fontsize="small")
    figure.savefig(HERE / "labelings.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", nargs="*", default=SETTINGS, help="rounds x channels; none: only table and plot")
    parser.add_argument("--labelings", nargs="*", default=["ind", "bit"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    arguments = parser.parse_args()
    for setting in arguments.settings:
        measure(setting, arguments.labelings, arguments.seeds)
    plot(tabulate())


if __name__ == "__main__":
    run_study(main)
