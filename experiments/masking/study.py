"""Refinement against irrevocable masking: the same network, tokens and compute, two objectives (README.md beside this).

    python experiments/masking/study.py [--digits runs/digits_c2i] [--seeds 1 2 3] [--steps 4 8 16 32 64]

from where the data are (pip install -e '.[studies]'). What runs/masking holds is neither trained nor measured again, so
that several of these, each with a part of the seeds, and then one of all write the table and plots.
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
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import grn.cli.entry  # noqa: F401  its resolvers
from grn.checkpoints.native import read_checkpoint
from grn.evaluation.scoring import build_scores
from grn.media import pictures
from grn.method import corruption
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.networks.class_refiner import ClassRefiner
from grn.networks.conditions import Labels
from grn.runtime.files import write_atomically, write_json
from grn.sampling.loading import bundle_from_checkpoint
from grn.sampling.refinement import Refinement, finished

matplotlib.use("agg")
from matplotlib import pyplot as plt

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
OUT = Path(os.environ.get("GRN_RUNS", "runs")) / "masking"
CLASSES = 16
MASK = CLASSES  # the seventeenth value a token can take, of masking alone
# As digits_c2i trains.
STEPS, BATCH, RATE, WARMUP, CLIP, EMA, DROPOUT = 900, 64, 1.5e-3, 100, 1.0, 0.99, 0.1
RATIO_MEAN, RATIO_STD = -0.8, 0.8
NUM = 500
CHOICE_TEMPERATURE = 4.5  # MaskGIT's (arXiv 2202.04200), of the noise that its order of confidence gets


class Digits(NamedTuple):
    """tokens int64 [N, D, 1, h, w] of the training digits, labels int64 [N], and what turns tokens into pixels."""

    tokens: Tensor
    labels: Tensor
    decode: Callable[[Tensor], Tensor]
    model: dict[str, Any]
    scores: Callable[[], dict[str, Any]]


def read_digits(ckpt: str) -> Digits:
    """The data, the tokenizer and the network's size of a run of digits_c2i."""
    checkpoint = read_checkpoint(ckpt)
    bundle, config = bundle_from_checkpoint(checkpoint), checkpoint.config
    datamodule = instantiate(config.data)
    tokens, labels = [], []
    for batch in datamodule.split_dataloader("train"):
        tokens.append(bundle.tokenize(batch["pixels"]))
        labels.append(batch["label"])
    model = {key: value for key, value in config.model.items() if key not in ("_target_", "weights", "classes")}
    splits = {name: (lambda name=name: datamodule.split_dataloader(name)) for name in ("train", "val")}
    partials = {name: part for name, part in instantiate(config.scores).items() if name in ("fid", "judge")}

    def scores() -> dict[str, Any]:
        return build_scores(partials, splits, device=torch.device("cpu"), cache_dir=Path(config.paths.data) / "cache")

    return Digits(torch.cat(tokens), torch.cat(labels), bundle.decode, model, scores)


# --- two objectives --------------------------------------------------------------------------------------------------


def refine_loss(network: ClassRefiner, tokens: Tensor, labels: Tensor, seed: int, step: int) -> Tensor:
    """The paper's: random tokens in place of some, and all of them are predicted."""
    ids = torch.arange(len(tokens))
    t = corruption.signal_ratio(seed, ids, step, mean=RATIO_MEAN, std=RATIO_STD)
    noisy = corruption.corrupt(tokens, t, CLASSES, seed=seed, ids=ids, step=step)
    return corruption.token_loss(network(noisy, t, labels), tokens)


def mask_loss(network: ClassRefiner, tokens: Tensor, labels: Tensor, seed: int, step: int) -> Tensor:
    """MaskGIT's: the mask in place of a share cos(pi/2 * r) of them, r uniform, and only these are predicted."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    masked_share = torch.cos(math.pi / 2 * torch.rand(len(tokens), generator=generator))
    masked = torch.rand(tokens.shape, generator=generator) < masked_share.view(-1, 1, 1, 1, 1)
    masked[:, 0, 0, 0, 0] |= ~masked.flatten(1).any(dim=1)
    logits = network(tokens.masked_fill(masked, MASK), 1 - masked_share, labels)[:, :CLASSES]
    return F.cross_entropy(logits, tokens.masked_fill(~masked, -100))


OBJECTIVES = {"refine": refine_loss, "mask": mask_loss}


def train(objective: str, digits: Digits, seed: int) -> ClassRefiner:
    """The average of the weights after STEPS steps; of both objectives the same digits come in the same order."""
    path = OUT / f"{objective}-{seed}.safetensors"
    torch.manual_seed(seed)
    network = ClassRefiner(**digits.model, classes=CLASSES + (objective == "mask"))
    if path.exists():
        network.load_state_dict(load_file(path), strict=False)  # all but tables that are made
        return network.eval()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    rate = LambdaLR(
        optimizer,
        lambda n: min(1, (n + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * max(0, n - WARMUP) / (STEPS - WARMUP))),
    )
    order = torch.Generator().manual_seed(seed)
    started, losses = time.process_time(), []
    for step in range(STEPS):
        rows = torch.randint(len(digits.tokens), (BATCH,), generator=order)
        dropped = torch.rand(BATCH, generator=order) < DROPOUT
        labels = digits.labels[rows].masked_fill(dropped, digits.model["num_labels"])
        loss = OBJECTIVES[objective](network, digits.tokens[rows], labels, seed, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        rate.step()
        average.update_parameters(network)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            log.info("%s, seed %d, step %d: loss %.3f", objective, seed, step + 1, sum(losses[-100:]) / 100)
    write_atomically(
        path, lambda file: save_file({k: v.contiguous() for k, v in average.module.state_dict().items()}, file)
    )
    log.info("%s, seed %d: %.0f CPU seconds", objective, seed, time.process_time() - started)
    return average.module.eval()


# --- samplers: (network, labels int64 [n], steps, guidance, seed) -> tokens int64 [n, D, 1, h, w] ---------------------


def refined(update: str) -> Callable[..., Tensor]:
    """Global refinement, Linear schedule: by the authors' redraw, or by the reverse step."""

    def sample(network: ClassRefiner, labels: Tensor, steps: int, guidance: float, seed: int) -> Tensor:
        refinement = Refinement(
            lambda tokens, t, condition: network(tokens, t, condition.index),
            Labels(labels, network.num_labels),
            Sampler(Linear(steps), guidance=guidance, update=update),
            shape=(network.channels, 1, network.size, network.size),
            classes=CLASSES,
            seed=seed,
            ids=torch.arange(len(labels)),
            batch_size=len(labels),
        )
        ((_, done),) = finished(refinement, len(labels))
        return done.tokens

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


def measure(digits: Digits, seeds: list[int], steps: list[int], guidance: float) -> None:
    """Leaves `<sampler>-<guidance>-<steps>-<seed>.json` in OUT; a seed is of training and of sampling."""
    scores = digits.scores()
    labels = torch.arange(NUM) % digits.model["num_labels"]
    for seed in seeds:
        for name, (objective, sample) in SAMPLERS.items():
            for number in steps:
                path = point(name, guidance, number, seed)
                if path.exists():
                    continue
                network = train(objective, digits, seed)
                started = time.process_time()
                tokens = torch.cat(
                    [
                        sample(network, part, number, guidance, seed * 1000 + i)
                        for i, part in enumerate(labels.split(100))
                    ]
                )
                seconds = time.process_time() - started
                pixels = torch.cat([digits.decode(part) for part in tokens.split(100)])[:, :, 0]
                for score in scores.values():
                    score.reset()
                    score.update(pixels, labels, torch.arange(NUM))
                told = {key: value for score in scores.values() for key, value in score.compute().items()}
                row = {"sampler": name, "guidance": guidance, "steps": number, "seed": seed, "cpu_seconds": seconds}
                write_json(path, row | {key: told[key] for key in ("judge_accuracy", "fid")})
                log.info(
                    "%s, guidance %g, %d steps, seed %d: %.1f %%, FID %.1f",
                    name,
                    guidance,
                    number,
                    seed,
                    100 * told["judge_accuracy"],
                    told["fid"],
                )
                if seed == seeds[0]:
                    pictures.save(pictures.grid(pixels[:40], 10, 1), path.with_suffix(".png"))


def point(name: str, guidance: float, steps: int, seed: int) -> Path:
    return OUT / f"{name.replace(': ', '-').replace(' ', '_')}-{guidance:g}-{steps}-{seed}.json"


# --- the table and the plots ------------------------------------------------------------------------------------------


def tabulate() -> list[dict[str, Any]]:
    """Writes results.csv, prints it as a table; a row a sampler, guidance and number of steps, over the seeds."""
    found: dict[tuple, list[dict]] = {}
    for path in OUT.glob("*.json"):
        row = json.loads(path.read_text())
        found.setdefault((row["guidance"], row["steps"], list(SAMPLERS).index(row["sampler"])), []).append(row)
    rows = []
    for (guidance, steps, place), runs in sorted(found.items()):
        row = {"guidance": guidance, "steps": steps, "sampler": list(SAMPLERS)[place], "seeds": len(runs)}
        for column, key in (("accuracy", "judge_accuracy"), ("fid", "fid")):
            values = np.array([run[key] for run in runs])
            row[column] = values.mean()
            row[f"{column}_error"] = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan
        rows.append(row | {"cpu_seconds": sum(run["cpu_seconds"] for run in runs) / len(runs)})
    with open(HERE / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print("| guidance | steps | sampler | seeds | read as asked for | FID |\n|---|---|---|---|---|---|")
    for row in rows:
        accuracy, fid = (
            f"{row[k] * s:.1f}" + (f" ± {row[f'{k}_error'] * s:.1f}" if row["seeds"] > 1 else "")
            for k, s in (("accuracy", 100), ("fid", 1))
        )
        print(f"| {row['guidance']:g} | {row['steps']} | {row['sampler']} | {row['seeds']} | {accuracy} % | {fid} |")
    return rows


def plot(rows: list[dict[str, Any]]) -> None:
    """steps.png: accuracy and FID by steps; bars are standard errors over seeds."""
    guidances = sorted({row["guidance"] for row in rows})
    size = (4.4 * len(guidances) + 0.4, 6.4)
    figure, axes = plt.subplots(2, len(guidances), figsize=size, layout="constrained", squeeze=False, sharey="row")
    styles = dict(zip(SAMPLERS, ("o-C0", "s-C1", "^--C2", "v--C3", "d--C4")))
    for column, guidance in enumerate(guidances):
        for axis, key in zip(axes[:, column], ("accuracy", "fid")):
            for name, style in styles.items():
                points = [row for row in rows if row["guidance"] == guidance and row["sampler"] == name]
                values, errors = ([row[k] for row in points] for k in (key, f"{key}_error"))
                axis.errorbar([row["steps"] for row in points], values, errors, fmt=style, capsize=2, label=name)
            ticks = sorted({row["steps"] for row in rows if row["guidance"] == guidance})
            axis.set(xscale="log", xlabel="steps", ylabel={"accuracy": "read as asked for", "fid": "FID"}[key])
            axis.set_xticks(ticks, ticks)
            axis.minorticks_off()
        axes[0, column].set_title(f"guidance {guidance:g}")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(HERE / "steps.png", dpi=100)
    plt.close(figure)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser()
    parser.add_argument("--digits", default="runs/digits_c2i")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="none: only table and plots")
    parser.add_argument("--steps", type=int, nargs="*", default=[4, 8, 16, 32, 64])
    parser.add_argument("--guidance", type=float, default=1.0)
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if arguments.seeds:
        measure(read_digits(arguments.digits), arguments.seeds, arguments.steps, arguments.guidance)
    plot(tabulate())


if __name__ == "__main__":
    main()
