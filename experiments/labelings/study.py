"""One token of 2^M classes a channel against M binary tokens, at the same network and steps, on digits (README.md).

    python experiments/labelings/study.py [--settings 4x4 1x4] [--labelings ind bit] [--seeds 1 2 3]

from where the data are (pip install -e '.[studies]'). What runs/labelings holds is neither trained nor measured again,
so that several of these, each with a part of the settings, and then one of all write the table and plot.
"""

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from hydra.utils import instantiate
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import grn.cli.entry  # noqa: F401  its resolvers
from grn.checkpoints.native import load_tokenizer, read_checkpoint
from grn.media.pixels import from_uint8, to_uint8
from grn.method import corruption, hbq
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.metrics.fid import GenerationScores
from grn.networks.class_refiner import ClassRefiner
from grn.networks.conditions import Labels
from grn.runtime.files import write_json
from grn.sampling.refinement import Refinement, finished
from grn.toys.digits_classifier import digits_classifier_weights
from grn.toys.judge import DigitsJudge

matplotlib.use("agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
OUT = Path(os.environ.get("GRN_RUNS", "runs")) / "labelings"
SETTINGS = ("4x4", "2x4", "6x4", "1x4", "4x2", "4x8")  # rounds M x channels of the tokenizer
# The network of digits_c2i, and its training but for the number of steps, which is half of its.
NETWORK = {"num_labels": 10, "size": 8, "depth": 4, "width": 128, "heads": 4, "bottleneck": 64}
NETWORK |= {"context_start": 2, "context_tokens": 4, "mlp_ratio": 3.0}
STEPS, BATCH, RATE, WARMUP, CLIP, EMA, DROPOUT = 450, 64, 1.5e-3, 100, 1.0, 0.99, 0.1
RATIO_MEAN, RATIO_STD, NUM, SAMPLED = -0.8, 0.8, 500, (8, 20)  # NUM samples, by 8 and by 20 steps
# Signal ratios at the middles of eighths of training's distribution: the mean over them stands for it.
RATIOS = torch.sigmoid(RATIO_MEAN + RATIO_STD * torch.special.ndtri((torch.arange(8) + 0.5) / 8)).tolist()


def tokenizer_of(setting: str) -> Path:
    """The run folder of a setting's tokenizer, which is trained (seed 0) if missing."""
    rounds, channels = setting.split("x")
    run = OUT / f"tokenizer-{rounds}-{channels}"
    if not (run / "metrics.json").is_file():
        given = ["+experiment=digits_tokenizer", f"model.rounds={rounds}", f"model.latent_channels={channels}"]
        given += [f"name=labelings/{run.name}", "logger=csv", "scores=none", "overwrite=true"]
        subprocess.run([sys.executable, "-m", "grn.train", *given], check=True)
    return run


@torch.enable_grad()
def train(network: ClassRefiner, tokens: Tensor, labels: Tensor, seed: int) -> ClassRefiner:
    """The weights' average. tokens int64 [N, D, 1, 8, 8], labels int64 [N]; t and order are the seed's alone."""
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    fall = [math.pi * max(0, step - WARMUP) / (STEPS - WARMUP) for step in range(STEPS + 1)]
    rate = LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 + math.cos(fall[step])) / 2)
    order, ids = torch.Generator().manual_seed(seed), torch.arange(BATCH)
    for step in range(STEPS):
        rows = torch.randint(len(tokens), (BATCH,), generator=order)
        dropped = torch.rand(BATCH, generator=order) < DROPOUT
        t = corruption.signal_ratio(seed, ids, step, mean=RATIO_MEAN, std=RATIO_STD)
        noisy = corruption.corrupt(tokens[rows], t, network.classes, seed=seed, ids=ids, step=step)
        asked = labels[rows].masked_fill(dropped, network.num_labels)
        loss = corruption.token_loss(network(noisy, t, asked), tokens[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        rate.step()
        average.update_parameters(network)
    return average.module.eval()


@torch.no_grad()
def held_out_bits(network: ClassRefiner, tokens: Tensor, labels: Tensor, t: float) -> float:
    """Cross-entropy of all of a picture's tokens from a map of signal ratio t, in bits, the mean over pictures."""
    ids, ratios = torch.arange(len(tokens)), torch.full((len(tokens),), t)
    noisy = corruption.corrupt(tokens, ratios, network.classes, seed=0, ids=ids, step=round(1e6 * t))
    parts = zip(*(it.split(100) for it in (noisy, ratios, labels, tokens)))
    nats = sum(corruption.token_loss(network(*given), true).item() * len(true) for *given, true in parts)
    return nats / len(tokens) * tokens[0].numel() / math.log(2)


def draw(network: ClassRefiner, labels: Tensor, steps: int, seed: int) -> Tensor:
    """Tokens int64 [N, D, 1, 8, 8] of labels int64 [N]."""
    wanted = {"shape": (network.channels, 1, network.size, network.size), "classes": network.classes, "seed": seed}
    wanted |= {"ids": torch.arange(len(labels)), "batch_size": 100}
    condition, sampler = Labels(labels, network.num_labels), Sampler(Linear(steps))
    refinement = Refinement(lambda tokens, t, those: network(tokens, t, those.index), condition, sampler, **wanted)
    return torch.cat([done.tokens for _, done in finished(refinement, 100)])


@torch.no_grad()
def measure(setting: str, labelings: list[str], seeds: list[int]) -> None:
    """Leaves `<setting>-<labeling>-<seed>.json` in OUT, and `<setting>.json` of the tokenizer alone."""
    rounds, channels = map(int, setting.split("x"))
    labelings = ["ind"] if rounds == 1 else labelings  # of one round, both are the same
    paths = {(one, seed): OUT / f"{setting}-{one}-{seed}.json" for seed in seeds for one in labelings}
    if all(path.is_file() for path in paths.values()):
        return
    run = tokenizer_of(setting)
    tokenizer = load_tokenizer(run)[0].eval()
    datamodule = instantiate(read_checkpoint(run).config.data)
    splits = {name: lambda name=name: datamodule.split_dataloader(name) for name in ("train", "val")}
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
    for (labeling, seed), path in paths.items():
        if path.is_file():
            continue
        torch.manual_seed(seed)
        size, classes = hbq.num_tokens(channels, rounds, labeling)
        network = ClassRefiner(channels=size, classes=classes, **NETWORK)
        tokens, held_out = (hbq.tokens(features[name], rounds, labeling) for name in ("train", "val"))
        row, started = {"rounds": rounds, "channels": channels, "labeling": labeling, "seed": seed}, time.process_time()
        network = train(network, tokens, labels["train"], seed)
        row["cpu_seconds"] = time.process_time() - started
        row["parameters"] = sum(parameter.numel() for parameter in network.parameters())
        row["bits_from_noise"], *bits = (held_out_bits(network, held_out, labels["val"], t) for t in (0.0, *RATIOS))
        row["bits"] = statistics.mean(bits)
        for steps in SAMPLED:
            images = to_uint8(tokenizer.detokenize(draw(network, asked, steps, seed), labeling))
            row |= {f"{name}_{steps}": value for name, value in scores(images, asked).items()}
        write_json(path, row)
        print(json.dumps(row), flush=True)


MEASURES = {"bits": (1, 0), "bits_from_noise": (1, 0)}  # by what a column is multiplied in the table, and its decimals
MEASURES |= {f"{name}_{steps}": it for steps in SAMPLED for name, it in (("accuracy", (100, 1)), ("fid", (1, 1)))}
MEASURES |= {"cpu_seconds": (1, 0)}


def tabulate() -> list[dict[str, Any]]:
    """Writes results.csv, prints it as a table; a row a setting and labeling, with standard errors over seeds."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for path in OUT.glob("*-*-*.json"):
        run = json.loads(path.read_text())
        found.setdefault((run["rounds"], run["channels"], run["labeling"] == "bit"), []).append(run)
    rows = []
    for (rounds, channels, bit), runs in sorted(found.items()):
        row = {"rounds": rounds, "channels": channels, "labeling": "bit" if bit else "ind", "seeds": len(runs)}
        for name in MEASURES:
            values = [run[name] for run in runs]
            row[name] = statistics.mean(values)
            row[f"{name}_error"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
        tokenizer = json.loads((OUT / f"{rounds}x{channels}.json").read_text())
        rows.append(row | {"tokenizer_fid": tokenizer["fid"], "parameters": runs[0]["parameters"]})
    with open(HERE / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print("| M | channels | labeling | seeds | " + " | ".join(MEASURES) + " |\n|" + "---|" * (4 + len(MEASURES)))
    for row in rows:
        told = [str(row[name]) for name in ("rounds", "channels", "labeling", "seeds")]
        told += [f"{row[k] * s:.{d}f} ± {row[f'{k}_error'] * s:.{d}f}" for k, (s, d) in MEASURES.items()]
        print("| " + " | ".join(told) + " |")
    return rows


def plot(rows: list[dict[str, Any]]) -> None:
    """labelings.png: bits, accuracy and FID by rounds, of 4 channels; bars are standard errors over seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    panels = {"bits": "held-out bits a picture", "accuracy": "read as asked for", "fid": "FID"}
    for axis, (measured, title) in zip(axes, panels.items()):
        names = [name for name in MEASURES if name.startswith(measured) and name != "bits_from_noise"]
        for labeling, color in (("ind", "C0"), ("bit", "C3")):
            points = [it for it in rows if it["channels"] == 4 and (it["labeling"] == labeling or it["rounds"] == 1)]
            for name, style in zip(names, ("o-", "s--")):
                told = f"{labeling}, {name.split('_')[1]} steps" if "_" in name else labeling
                x, y, errors = ([it[key] for it in points] for key in ("rounds", name, f"{name}_error"))
                axis.errorbar(x, y, errors, fmt=style, color=color, capsize=2, label=told)
        axis.set(xlabel="rounds M", ylabel=title)
        axis.legend(fontsize="small")
    figure.savefig(HERE / "labelings.png", dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", nargs="*", default=SETTINGS, help="rounds x channels; none: only table and plot")
    parser.add_argument("--labelings", nargs="*", default=["ind", "bit"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for setting in arguments.settings:
        measure(setting, arguments.labelings, arguments.seeds)
    plot(tabulate())


if __name__ == "__main__":
    main()
