"""Class refiners of three sizes on digits, each trained for several numbers of steps: loss and quality against FLOP.

    python experiments/model_size/study.py [--digits runs/digits_c2i] [--seeds 1 2 3] [--steps 100 300 900]

from where the data are (pip install -e '.[studies]'). What runs/model_size holds is not trained again; the cheapest
trainings come first, so that the table and the plot are of use however early it is stopped (README.md beside this).
"""

import argparse
import logging
import time
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

import grn.cli.entry  # noqa: F401  its resolvers
from grn.media.pixels import from_uint8
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.networks.class_refiner import ClassRefiner
from grn.runtime.files import write_json
from grn.runtime.flops import training_flop
from grn.studies.class_refiners import BATCH, EMA, RATE, Run, draw, fit, read_run, refinement_loss
from grn.studies.plots import error_bars, log_x
from grn.studies.results import Column, markdown, over_seeds, read_points, write_csv
from grn.studies.study import folder_of, missing, run_study
from grn.training.optimization import adamw, learning_rate_schedule

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
OUT = folder_of("model_size")
SIZES = {  # 32 channels a head, as digits_c2i, which is the second
    "64 x 2": {"width": 64, "depth": 2, "heads": 2, "context_start": 1},
    "128 x 4": {"width": 128, "depth": 4, "heads": 4, "context_start": 2},
    "192 x 6": {"width": 192, "depth": 6, "heads": 6, "context_start": 3},
}
NUM, SAMPLER = 500, Sampler(Linear(8), guidance=1.0)
DRAWS = 4  # corruptions of each held-out digit, the same for all networks
METRICS = ("val_loss", "judge_accuracy", "fid")


def tokens_of(digits: Run, split: str) -> Tensor:
    """Of all pixels of a split at once: int64 [N, D, 1, h, w]."""
    return digits.bundle.tokenizer.tokenize(from_uint8(digits.all("pixels", split)), "ind")


def train(network: ClassRefiner, tokens: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    """Leaves the average of the weights in `network`; all sizes see the same digits, corrupted alike, in one order.

    The warm-up of 100 steps that digits_c2i has is a ninth of the training here, however long that is.
    """
    optimizer = adamw(network, learning_rate=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = learning_rate_schedule(optimizer, name="cosine", warmup_steps=steps // 9, total_steps=steps)
    weights = list(network.parameters())
    averages = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def average(step: int) -> None:
        """With a decay that rises to EMA, so that short trainings forget the initial weights."""
        torch._foreach_lerp_(averages, weights, 1 - min(EMA, (1 + step) / (10 + step)))

    fit(network, tokens, labels, optimizer, schedule, steps=steps, seed=seed, after_step=average)
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(averages), weights)


@torch.no_grad()
def evaluate(network: ClassRefiner, digits: Run, held_out: Tensor, seed: int) -> dict[str, float]:
    """Loss of held-out tokens at corruptions that are the same for all networks, and the scores of NUM samples."""
    network.eval()
    losses = [refinement_loss(network, held_out, digits.all("label", "val"), 0, i).item() for i in range(DRAWS)]
    labels, ids = torch.arange(NUM) % network.num_labels, torch.arange(NUM)
    tokens = draw(network, labels, SAMPLER, seed)
    for score in digits.scores.values():
        score.reset()
    for rows in ids.split(100):
        pixels = digits.bundle.decode(tokens[rows])[:, :, 0]
        for score in digits.scores.values():
            score.update(pixels, labels[rows], rows)
    told = {key: value for score in digits.scores.values() for key, value in score.compute().items()}
    return {"val_loss": sum(losses) / DRAWS} | told


def measure(digits: Run, seeds: list[int], steps: list[int]) -> None:
    """Leaves `<size>-<steps>-<seed>.json` in OUT, the cheapest first."""
    tokens, labels, held_out = tokens_of(digits, "train"), digits.all("label"), tokens_of(digits, "val")
    one = [part.to("meta") for part in (tokens[:1], torch.zeros(1), labels[:1])]
    points = []
    for name, size in SIZES.items():
        flop = training_flop(ClassRefiner(**digits.model | size), lambda network: network(*one))
        points += [(number * BATCH * flop, number, name, seed) for number in steps for seed in seeds]

    def path_of(_: int, number: int, name: str, seed: int) -> Path:
        return OUT / f"{name.replace(' ', '')}-{number}-{seed}.json"

    for (flop, number, name, seed), path in missing(sorted(points, key=lambda point: point[:3]), path_of):
        torch.manual_seed(seed)
        network = ClassRefiner(**digits.model | SIZES[name])
        started = time.process_time()
        train(network, tokens, labels, number, seed)
        row = {"size": name, "parameters": sum(p.numel() for p in network.parameters()), "steps": number}
        row |= {"seed": seed, "flop": flop, "cpu_seconds": time.process_time() - started}
        told = evaluate(network, digits, held_out, seed)
        write_json(path, row | {key: told[key] for key in METRICS})
        log.info("%s: %s", path.stem, {key: round(told[key], 3) for key in METRICS})


def tabulate() -> pd.DataFrame:
    """Writes results.csv and prints it as a table; a row a size and number of steps, over the seeds."""
    measures = (*METRICS, "cpu_seconds")
    points = read_points(OUT, ("size", "steps"), ("parameters", "flop", *measures), order={"size": SIZES})
    table = over_seeds(points, ("size", "parameters", "steps", "flop"), measures).drop(columns="cpu_seconds_error")
    write_csv(table, HERE / "results.csv")
    columns = [Column("size"), Column("parameters", scale=1e-6, spec=".2f", unit=" M"), Column("steps")]
    columns += [Column("flop", "training TFLOP", 1e-12, ".3g"), Column("seeds")]
    columns += [Column("val_loss", "held-out loss", spec=".3f")]
    columns += [Column("judge_accuracy", "read as asked for", 100, ".1f", " %"), Column("fid", "FID", spec=".1f")]
    print(markdown(table, columns))
    return table


def plot(table: pd.DataFrame) -> None:
    """flop.png: held-out loss, accuracy and FID by training FLOP; bars are standard errors over seeds."""
    table = table.assign(tflop=table.flop / 1e12)
    figure = Figure((11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, metric, label in zip(axes, METRICS, ("held-out loss, nats a token", "read as asked for", "FID")):
        error_bars(axis, table, "tflop", metric, "size", dict(zip(SIZES, ("o-C0", "s-C1", "^-C2"))))
        log_x(axis, (0.3, 1, 3, 10, 30))
        axis.set(xlabel="TFLOP of training", ylabel=label)
    axes[2].set(yscale="log", yticks=(30, 50, 100, 200, 400), yticklabels=(30, 50, 100, 200, 400))
    axes[2].minorticks_off()
    axes[0].legend(title="width x depth", fontsize="small")
    figure.savefig(HERE / "flop.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--digits", default="runs/digits_c2i")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="none: only the table and the plot")
    parser.add_argument("--steps", type=int, nargs="*", default=[100, 300, 900])
    arguments = parser.parse_args()
    if arguments.seeds:
        measure(read_run(arguments.digits, OUT / "cache"), arguments.seeds, arguments.steps)
    plot(tabulate())


if __name__ == "__main__":
    run_study(main)
