"""Class refiners of three sizes on digits, each trained for several numbers of steps: loss and quality against FLOP.

    python experiments/model_size/study.py [--digits runs/digits_c2i] [--seeds 1 2 3] [--steps 100 300 900]

from where the data are (pip install -e '.[studies]'). What runs/model_size holds is not trained again; the cheapest
trainings come first, so that the table and the plot are of use however early it is stopped (README.md beside this).
"""

import argparse
import csv
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from hydra.utils import instantiate
from torch import Tensor

import grn.cli.entry  # noqa: F401  its resolvers
from grn.checkpoints.native import read_checkpoint
from grn.evaluation.scoring import build_scores, real_splits
from grn.media.pixels import from_uint8
from grn.method import corruption
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.networks.class_refiner import ClassRefiner
from grn.networks.conditions import Labels
from grn.runtime.files import write_json
from grn.runtime.flops import training_flop
from grn.sampling.loading import bundle_from_checkpoint
from grn.sampling.refinement import Refinement, finished
from grn.training.optimization import adamw, learning_rate_schedule

matplotlib.use("agg")
from matplotlib import pyplot as plt

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
OUT = Path(os.environ.get("GRN_RUNS", "runs")) / "model_size"
SIZES = {  # 32 channels a head, as digits_c2i, which is the second
    "64 x 2": {"width": 64, "depth": 2, "heads": 2, "context_start": 1},
    "128 x 4": {"width": 128, "depth": 4, "heads": 4, "context_start": 2},
    "192 x 6": {"width": 192, "depth": 6, "heads": 6, "context_start": 3},
}
# As digits_c2i trains; its warm-up of 100 steps is a ninth of the training here, however long that is.
BATCH, RATE, CLIP, EMA, DROPOUT = 64, 1.5e-3, 1.0, 0.99, 0.1
RATIO = {"mean": -0.8, "std": 0.8}
NUM, SAMPLER = 500, Sampler(Linear(8), guidance=1.0)
DRAWS = 4  # corruptions of each held-out digit, the same for all networks
METRICS = ("val_loss", "judge_accuracy", "fid")


class Digits(NamedTuple):
    """Tokens int64 [N, D, 1, h, w] and labels int64 [N] of "train" and "val", and what turns tokens into pixels."""

    tokens: dict[str, Tensor]
    labels: dict[str, Tensor]
    decode: Callable[[Tensor], Tensor]
    model: dict[str, Any]
    scores: dict[str, Any]


def read_digits(ckpt: str) -> Digits:
    """The data, tokenizer, scores and network's settings of a run of digits_c2i."""
    checkpoint = read_checkpoint(ckpt)
    bundle, config = bundle_from_checkpoint(checkpoint), checkpoint.config
    datamodule = instantiate(config.data)
    splits = real_splits(datamodule, clips=False)
    batches = {name: list(read()) for name, read in splits.items()}
    labels = {name: torch.cat([batch["label"] for batch in split]) for name, split in batches.items()}
    pixels = {name: torch.cat([batch["pixels"] for batch in split]) for name, split in batches.items()}
    tokens = {name: bundle.tokenizer.tokenize(from_uint8(split), "ind") for name, split in pixels.items()}
    model = {key: value for key, value in config.model.items() if key not in ("_target_", "weights")}
    partials = instantiate({name: config.scores[name] for name in ("fid", "judge")})
    scores = build_scores(partials, splits, device=torch.device("cpu"), cache_dir=OUT / "cache")
    return Digits(tokens, labels, bundle.decode, model, scores)


def corrupted_loss(network: ClassRefiner, tokens: Tensor, labels: Tensor, seed: int, step: int) -> Tensor:
    """The training objective: in nats a token, of all tokens where random ones stand in place of some."""
    ids = torch.arange(len(tokens))
    t = corruption.signal_ratio(seed, ids, step, **RATIO)
    noisy = corruption.corrupt(tokens, t, network.classes, seed=seed, ids=ids, step=step)
    return corruption.token_loss(network(noisy, t, labels), tokens)


def train(network: ClassRefiner, digits: Digits, steps: int, seed: int) -> None:
    """Leaves the average of the weights in `network`; all sizes see the same digits, corrupted alike, in one order."""
    optimizer = adamw(network, learning_rate=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    rate = learning_rate_schedule(optimizer, name="cosine", warmup_steps=steps // 9, total_steps=steps)
    weights = list(network.parameters())
    averages = [weight.detach().clone() for weight in weights]
    tokens, labels = digits.tokens["train"], digits.labels["train"]
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(tokens), (BATCH,), generator=order)
        dropped = torch.rand(BATCH, generator=order) < DROPOUT
        loss = corrupted_loss(network, tokens[rows], labels[rows].masked_fill(dropped, network.num_labels), seed, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        rate.step()
        with torch.no_grad():  # a decay that rises to EMA, so that short trainings forget the initial weights
            torch._foreach_lerp_(averages, weights, 1 - min(EMA, (1 + step) / (10 + step)))
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(averages), weights)


@torch.no_grad()
def evaluate(network: ClassRefiner, digits: Digits, seed: int) -> dict[str, float]:
    """Loss of held-out digits at corruptions that are the same for all networks, and the scores of NUM samples."""
    network.eval()
    held_out = digits.tokens["val"], digits.labels["val"]
    told = {"val_loss": sum(corrupted_loss(network, *held_out, 0, draw).item() for draw in range(DRAWS)) / DRAWS}
    labels = torch.arange(NUM) % network.num_labels
    refinement = Refinement(
        lambda tokens, t, condition: network(tokens, t, condition.index),
        Labels(labels, network.num_labels),
        SAMPLER,
        shape=(network.channels, 1, network.size, network.size),
        classes=network.classes,
        seed=seed,
        ids=torch.arange(NUM),
        batch_size=100,
    )
    for score in digits.scores.values():
        score.reset()
    for ids, done in finished(refinement, 100):
        pixels = digits.decode(done.tokens)[:, :, 0]
        for score in digits.scores.values():
            score.update(pixels, labels[ids], ids)
    return told | {key: value for score in digits.scores.values() for key, value in score.compute().items()}


def measure(digits: Digits, seeds: list[int], steps: list[int]) -> None:
    """Leaves `<size>-<steps>-<seed>.json` in OUT, the cheapest first."""
    OUT.mkdir(parents=True, exist_ok=True)
    one = [part.to("meta") for part in (digits.tokens["val"][:1], torch.zeros(1), digits.labels["val"][:1])]
    runs = []
    for name, size in SIZES.items():
        flop = training_flop(ClassRefiner(**digits.model | size), lambda network: network(*one))
        runs += [(number * BATCH * flop, number, name) for number in steps]
    for flop, number, name in sorted(runs):
        for seed in seeds:
            path = OUT / f"{name.replace(' ', '')}-{number}-{seed}.json"
            if path.exists():
                continue
            torch.manual_seed(seed)
            network = ClassRefiner(**digits.model | SIZES[name])
            started = time.process_time()
            train(network, digits, number, seed)
            row = {"size": name, "parameters": sum(p.numel() for p in network.parameters()), "steps": number}
            row |= {"seed": seed, "flop": flop, "cpu_seconds": time.process_time() - started}
            told = evaluate(network, digits, seed)
            write_json(path, row | {key: told[key] for key in METRICS})
            log.info("%s: %s", path.stem, {key: round(told[key], 3) for key in METRICS})


def tabulate() -> list[dict[str, Any]]:
    """Writes results.csv and prints it as a table; a row a size and number of steps, over the seeds."""
    found: dict[tuple, list[dict]] = {}
    for path in OUT.glob("*.json"):
        run = json.loads(path.read_text())
        found.setdefault((list(SIZES).index(run["size"]), run["steps"]), []).append(run)
    rows = []
    for _, runs in sorted(found.items()):
        row = {key: runs[0][key] for key in ("size", "parameters", "steps", "flop")}
        row["seeds"] = len(runs)
        for metric in METRICS:
            values = np.array([run[metric] for run in runs])
            row[metric] = values.mean()
            row[f"{metric}_error"] = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan
        rows.append(row | {"cpu_seconds": sum(run["cpu_seconds"] for run in runs) / len(runs)})
    with open(HERE / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print("| size | parameters | steps | training TFLOP | seeds | held-out loss | read as asked for | FID |")
    print("|---" * 8 + "|")
    for row in rows:
        scaled = zip(METRICS, (1, 100, 1), (".3f", ".1f", ".1f"))
        loss, accuracy, fid = (f"{row[m] * s:{f}} ± {row[f'{m}_error'] * s:{f}}" for m, s, f in scaled)
        size = f"{row['size']} | {row['parameters'] / 1e6:.2f} M | {row['steps']} | {row['flop'] / 1e12:.3g}"
        print(f"| {size} | {row['seeds']} | {loss} | {accuracy} % | {fid} |".replace(" ± nan", ""))
    return rows


def plot(rows: list[dict[str, Any]]) -> None:
    """flop.png: held-out loss, accuracy and FID by training FLOP; bars are standard errors over seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axis, metric, label in zip(axes, METRICS, ("held-out loss, nats a token", "read as asked for", "FID")):
        for name, style in zip(SIZES, ("o-C0", "s-C1", "^-C2")):
            points = [row for row in rows if row["size"] == name]
            flop, values, errors = ([row[key] for row in points] for key in ("flop", metric, f"{metric}_error"))
            axis.errorbar([number / 1e12 for number in flop], values, errors, fmt=style, capsize=2, label=name)
        axis.set(xscale="log", xlabel="TFLOP of training", ylabel=label)
        axis.set_xticks((0.3, 1, 3, 10, 30), (0.3, 1, 3, 10, 30))
        axis.minorticks_off()
    axes[2].set(yscale="log", yticks=(30, 50, 100, 200, 400), yticklabels=(30, 50, 100, 200, 400))
    axes[2].minorticks_off()
    axes[0].legend(title="width x depth", fontsize="small")
    figure.savefig(HERE / "flop.png", dpi=100)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser()
    parser.add_argument("--digits", default="runs/digits_c2i")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="none: only the table and the plot")
    parser.add_argument("--steps", type=int, nargs="*", default=[100, 300, 900])
    arguments = parser.parse_args()
    if arguments.seeds:
        measure(read_digits(arguments.digits), arguments.seeds, arguments.steps)
    plot(tabulate())


if __name__ == "__main__":
    main()
