"""Class refiners trained on tokens in memory, on the CPU: as digits_c2i trains, without Lightning around it."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from grn.checkpoints.native import read_checkpoint
from grn.checkpoints.trust import check_group
from grn.evaluation.scoring import build_scores, real_splits
from grn.method import corruption
from grn.method.sampler import Sampler
from grn.networks.class_refiner import ClassRefiner
from grn.networks.conditions import Labels
from grn.runtime.errors import UserError
from grn.sampling.bundle import RefinerBundle
from grn.sampling.loading import bundle_from_checkpoint
from grn.sampling.refinement import Refinement, finished

log = logging.getLogger(__name__)

# As digits_c2i trains.
BATCH, RATE, WARMUP, CLIP, EMA, DROPOUT = 64, 1.5e-3, 100, 1.0, 0.99, 0.1
RATIO = {"mean": -0.8, "std": 0.8}

# (network, tokens int64 [B, D, 1, h, w], labels int64 [B], seed, step) -> loss
Objective = Callable[[ClassRefiner, Tensor, Tensor, int, int], Tensor]


class Run(NamedTuple):
    """Of a class refiner's run: the batches of "train" and "val", the pair, the network's settings, FID and judge."""

    batches: dict[str, list[dict[str, Any]]]
    bundle: RefinerBundle
    model: dict[str, Any]
    scores: dict[str, Any]

    def all(self, key: str, split: str = "train") -> Tensor:
        """`pixels` uint8 [N, 3, 1, H, W] or `label` int64 [N] of a whole split."""
        return torch.cat([batch[key] for batch in self.batches[split]])


def read_run(ckpt: str, cache_dir: Path | None = None) -> Run:
    """Reads a run like digits_c2i.

    Args:
        cache_dir: where scores keep what they make of the data; None: where commands do.

    Raises:
        UserError: it is no run of a class refiner, or its data are missing.
    """
    checkpoint = read_checkpoint(ckpt)
    bundle, config = bundle_from_checkpoint(checkpoint), checkpoint.config
    if not isinstance(bundle.network, ClassRefiner) or not {"fid", "judge"} <= (config.scores or {}).keys():
        raise UserError(f"{ckpt} is no run of a class refiner with the scores fid and judge, as digits_c2i is")
    for group in ("data", "scores"):
        check_group(group, OmegaConf.to_container(config[group]), f"{ckpt} is not to be trusted")
    splits = real_splits(instantiate(config.data), clips=False)
    batches = {name: list(read()) for name, read in splits.items()}
    model = {key: value for key, value in config.model.items() if key not in ("_target_", "weights")}
    partials = instantiate({name: config.scores[name] for name in ("fid", "judge")})
    cache_dir = cache_dir or Path(config.paths.data) / "cache"
    return Run(batches, bundle, model, build_scores(partials, splits, device=torch.device("cpu"), cache_dir=cache_dir))


def refinement_loss(network: ClassRefiner, tokens: Tensor, labels: Tensor, seed: int, step: int) -> Tensor:
    """The paper's objective: in nats a token, of all tokens where random ones stand in place of some.

    Args:
        tokens: int64 [B, D, 1, h, w].
        labels: int64 [B], `num_labels` for none.
        seed, step: t and what is corrupted are functions of these and of the place in the batch.
    """
    ids = torch.arange(len(tokens))
    t = corruption.signal_ratio(seed, ids, step, **RATIO)
    noisy = corruption.corrupt(tokens, t, network.classes, seed=seed, ids=ids, step=step)
    return corruption.token_loss(network(noisy, t, labels), tokens)


@torch.enable_grad()
def fit(
    network: ClassRefiner,
    tokens: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    *,
    steps: int,
    seed: int,
    after_step: Callable[[int], object],
    objective: Objective = refinement_loss,
) -> None:
    """Trains `network` in place; networks of one seed see the same rows in one order, whatever they are.

    Args:
        tokens: int64 [N, D, 1, h, w].
        labels: int64 [N].
        after_step: called with the step's number, from 0; for averages of the weights.
    """
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for step in range(steps):
        rows = torch.randint(len(tokens), (BATCH,), generator=order)
        dropped = torch.rand(BATCH, generator=order) < DROPOUT
        loss = objective(network, tokens[rows], labels[rows].masked_fill(dropped, network.num_labels), seed, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        after_step(step)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            log.info("seed %d, step %d: loss %.3f", seed, step + 1, sum(losses[-100:]) / 100)


def train(
    network: ClassRefiner,
    tokens: Tensor,
    labels: Tensor,
    *,
    steps: int,
    seed: int,
    objective: Objective = refinement_loss,
) -> ClassRefiner:
    """The average of the weights: AdamW, its rate warmed up and then a cosine down to 0. Arguments as of `fit`."""
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def factor(step: int) -> float:
        return (
            min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * max(0, step - WARMUP) / max(1, steps - WARMUP))) / 2
        )

    schedule = LambdaLR(optimizer, factor)

    def update(_: int) -> None:
        average.update_parameters(network)

    fit(network, tokens, labels, optimizer, schedule, steps=steps, seed=seed, after_step=update, objective=objective)
    assert isinstance(average.module, ClassRefiner)  # a copy of `network`
    return average.module.eval()


def draw(network: ClassRefiner, labels: Tensor, sampler: Sampler, seed: int, *, batch_size: int = 100) -> Tensor:
    """Samples of labels int64 [N]: tokens int64 [N, D, 1, h, w], each a function of the seed and its place."""
    refinement = Refinement(
        lambda tokens, t, condition: network(tokens, t, condition.index),
        Labels(labels, network.num_labels),
        sampler,
        shape=(network.channels, 1, network.size, network.size),
        classes=network.classes,
        seed=seed,
        ids=torch.arange(len(labels)),
        batch_size=batch_size,
    )
    rows, done = zip(*finished(refinement, batch_size))
    return torch.cat([part.tokens for part in done])[torch.cat(rows).argsort()]
