"""Refinement against irrevocable masking: the same network, tokens and compute, two objectives (README.md beside this).

    python experiments/masking/study.py [--digits runs/digits_c2i] [--seeds 1 2 3] [--steps 4 8 16 32 64]

from where the data are (pip install -e '.[studies]'). What runs/masking holds is neither trained nor measured again, so
that several of these, each with a part of the seeds, and then one of all write the table and plots.
"""

import argparse
import logging
import math
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import grn.cli.entry  # noqa: F401  its resolvers
from grn.media import pictures
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.networks.class_refiner import ClassRefiner
from grn.runtime.files import write_atomically, write_json
from grn.studies.class_refiners import Run, draw, read_run, refinement_loss, train
from grn.studies.plots import error_bars, log_x
from grn.studies.results import Column, markdown, over_seeds, read_points, write_csv
from grn.studies.study import folder_of, missing, run_study

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
OUT = folder_of("masking")
CLASSES = 16
MASK = CLASSES  # the seventeenth value a token can take, of masking alone
STEPS = 900  # as digits_c2i
NUM = 500
CHOICE_TEMPERATURE = 4.5  # MaskGIT's (arXiv 2202.04200), of the noise that its order of confidence gets


# --- two objectives: refinement_loss, and this ------------------------------------------------------------------------


def mask_loss(network: ClassRefiner, tokens: Tensor, labels: Tensor, seed: int, step: int) -> Tensor:
    """MaskGIT's: the mask in place of a share cos(pi/2 * r) of them, r uniform, and only these are predicted."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    masked_share = torch.cos(math.pi / 2 * torch.rand(len(tokens), generator=generator))
    masked = torch.rand(tokens.shape, generator=generator) < masked_share.view(-1, 1, 1, 1, 1)
    masked[:, 0, 0, 0, 0] |= ~masked.flatten(1).any(dim=1)
    logits = network(tokens.masked_fill(masked, MASK), 1 - masked_share, labels)[:, :CLASSES]
    return F.cross_entropy(logits, tokens.masked_fill(~masked, -100))


OBJECTIVES = {"refine": refinement_loss, "mask": mask_loss}


def trained(objective: str, model: dict, tokens: Tensor, labels: Tensor, seed: int) -> ClassRefiner:
    """The average of the weights after STEPS steps; of both objectives the same digits come in the same order.

    Args:
        model: the network's settings, but for its classes.
        tokens, labels: int64 [N, D, 1, h, w] and [N].
    """
    path = OUT / f"{objective}-{seed}.safetensors"
    torch.manual_seed(seed)
    network = ClassRefiner(**model | {"classes": CLASSES + (objective == "mask")})
    if path.exists():
        network.load_state_dict(load_file(path), strict=False)  # all but tables that are made
        return network.eval()
    log.info("%s, seed %d is trained", objective, seed)
    started = time.process_time()
    average = train(network, tokens, labels, steps=STEPS, seed=seed, objective=OBJECTIVES[objective])
    write_atomically(path, lambda file: save_file({k: v.contiguous() for k, v in average.state_dict().items()}, file))
    log.info("%s, seed %d: %.0f CPU seconds", objective, seed, time.process_time() - started)
    return average


# --- samplers: (network, labels int64 [n], steps, guidance, seed) -> tokens int64 [n, D, 1, h, w] ---------------------


def refined(update: str) -> Callable[..., Tensor]:
    """Global refinement, Linear schedule: by the authors' redraw, or by the reverse step."""

    def sample(network: ClassRefiner, labels: Tensor, steps: int, guidance: float, seed: int) -> Tensor:
        return draw(network, labels, Sampler(Linear(steps), guidance=guidance, update=update), seed)

    return sample


def unmasked(order: str) -> Callable[..., Tensor]:
    """MaskGIT's: all are masked at first; each step draws those that still are, and keeps a part for good.

    `confidence` keeps what is most probable, with Gumbel noise that fades; `random` any. `remask` keeps nothing for
    good: what stays masked after a step is chosen at random among all tokens, known ones too (as ReMDM, 2503.00307).
    """

    @torch.no_grad()
    def sample(network: ClassRefiner, labels: Tensor, steps: int, guidance: float, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.full((len(labels), network.channels, 1, network.size, network.size), MASK)
        count = tokens[0].numel()
        for step in range(steps):
            masked = tokens == MASK
            t = 1 - masked.flatten(1).float().mean(dim=1)
            logits = network(tokens, t, labels)[:, :CLASSES]
            if guidance != 1:
                free = network(tokens, t, torch.full_like(labels, network.num_labels))[:, :CLASSES]
                logits = free + guidance * (logits - free)
            log_p = logits.log_softmax(dim=1)
            noise = -torch.empty_like(log_p).exponential_(generator=generator).log()
            drawn = (log_p + noise).argmax(dim=1)
            tokens = torch.where(masked, drawn, tokens)
            left = int(count * math.cos(math.pi / 2 * (step + 1) / steps)) if step + 1 < steps else 0
            score = -torch.empty(tokens.shape).exponential_(generator=generator).log()
            if order == "confidence":
                certain = log_p.gather(1, drawn[:, None]).squeeze(1)
                score = certain + CHOICE_TEMPERATURE * (1 - (step + 1) / steps) * score
            if order != "remask":
                score = score.masked_fill(~masked, math.inf)
            again = score.flatten(1).topk(left, dim=1, largest=False).indices
            tokens = tokens.flatten(1).scatter(1, again, MASK).view_as(tokens)
        return tokens

    return sample


SAMPLERS = {  # name: (objective, sampler)
    "refinement: redraw": ("refine", refined("redraw")),
    "refinement: psi": ("refine", refined("psi")),
    "masking: by confidence": ("mask", unmasked("confidence")),
    "masking: in random order": ("mask", unmasked("random")),
    "masking: remasked": ("mask", unmasked("remask")),
}


def measure(digits: Run, seeds: list[int], steps: list[int], guidance: float) -> None:
    """Leaves `<sampler>-<guidance>-<steps>-<seed>.json` in OUT; a seed is of training and of sampling."""
    labels = torch.arange(NUM) % digits.model["num_labels"]
    tokens = torch.cat([digits.bundle.tokenize(batch["pixels"]) for batch in digits.batches["train"]])

    def path_of(seed: int, name: str, number: int) -> Path:
        return OUT / f"{name.replace(': ', '-').replace(' ', '_')}-{guidance:g}-{number}-{seed}.json"

    for (seed, name, number), path in missing(product(seeds, SAMPLERS, steps), path_of):
        objective, sample = SAMPLERS[name]
        network = trained(objective, digits.model, tokens, digits.all("label"), seed)
        started = time.process_time()
        parts = enumerate(labels.split(100))
        drawn = [sample(network, part, number, guidance, seed * 1000 + i) for i, part in parts]
        row = {"sampler": name, "guidance": guidance, "steps": number, "seed": seed}
        row["cpu_seconds"] = time.process_time() - started
        pixels = torch.cat([digits.bundle.decode(part) for part in drawn])[:, :, 0]
        for score in digits.scores.values():
            score.reset()
            score.update(pixels, labels, torch.arange(NUM))
        told = {key: value for score in digits.scores.values() for key, value in score.compute().items()}
        write_json(path, row | {key: told[key] for key in ("judge_accuracy", "fid")})
        log.info("%s: %.1f %%, FID %.1f", path.stem, 100 * told["judge_accuracy"], told["fid"])
        if seed == seeds[0]:
            pictures.save(pictures.grid(pixels[:40], 10, 1), path.with_suffix(".png"))


# --- the table and the plots ------------------------------------------------------------------------------------------


def tabulate() -> pd.DataFrame:
    """Writes results.csv, prints it as a table; a row a sampler, guidance and number of steps, over the seeds."""
    by = ("guidance", "steps", "sampler")
    points = read_points(OUT, by, ("judge_accuracy", "fid", "cpu_seconds"), order={"sampler": SAMPLERS})
    points = points.rename(columns={"judge_accuracy": "accuracy"})
    table = over_seeds(points, by, ("accuracy", "fid", "cpu_seconds")).drop(columns="cpu_seconds_error")
    write_csv(table, HERE / "results.csv")
    columns = [Column("guidance", spec="g"), Column("steps"), Column("sampler"), Column("seeds")]
    columns += [Column("accuracy", "read as asked for", 100, ".1f", " %"), Column("fid", "FID", spec=".1f")]
    print(markdown(table, columns))
    return table


def plot(table: pd.DataFrame) -> None:
    """steps.png: accuracy and FID by steps; bars are standard errors over seeds."""
    guidances = sorted(table.guidance.unique())
    figure = Figure((4.4 * len(guidances) + 0.4, 6.4), layout="constrained")
    axes = figure.subplots(2, len(guidances), squeeze=False, sharey="row")
    styles = dict(zip(SAMPLERS, ("o-C0", "s-C1", "^--C2", "v--C3", "d--C4")))
    for column, guidance in enumerate(guidances):
        own = table[table.guidance == guidance]
        for axis, (key, label) in zip(axes[:, column], (("accuracy", "read as asked for"), ("fid", "FID"))):
            error_bars(axis, own, "steps", key, "sampler", styles)
            log_x(axis, sorted(own.steps.unique()))
            axis.set(xlabel="steps", ylabel=label)
        axes[0, column].set_title(f"guidance {guidance:g}")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(HERE / "steps.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--digits", default="runs/digits_c2i")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="none: only table and plots")
    parser.add_argument("--steps", type=int, nargs="*", default=[4, 8, 16, 32, 64])
    parser.add_argument("--guidance", type=float, default=1.0)
    arguments = parser.parse_args()
    if arguments.seeds:
        measure(read_run(arguments.digits), arguments.seeds, arguments.steps, arguments.guidance)
    plot(tabulate())


if __name__ == "__main__":
    run_study(main)
