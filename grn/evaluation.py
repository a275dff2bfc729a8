"""Feeding scores: a generator's samples, or a tokenizer's reconstructions, to every configured score."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from grn.errors import UserError
from grn.generation import equal_labels, generate
from grn.metrics.ranks import Rows
from grn.metrics.reconstruction import ReconstructionScores
from grn.metrics.splits import images as as_images
from grn.sampler import Sampler
from grn.training import RefinerModule, TokenizerModule

Advance = Callable[[int], None]


def build_scores(
    partials: Mapping[str, Any], datamodule: LightningDataModule, *, device: torch.device, cache_dir: Path
) -> dict[str, Any]:
    """The scores of an instantiated `scores` config (name -> partial), given the splits of the data."""
    return {
        name: score(
            train=lambda: datamodule.split_dataloader("train"),
            heldout=lambda: datamodule.split_dataloader("heldout"),
            device=device,
            cache_dir=cache_dir,
        )
        for name, score in partials.items()
    }


def score_samples(
    module: RefinerModule,
    scores: Mapping[str, Any],
    *,
    num: int,
    batch_size: int,
    seed: int,
    sampler: Sampler | None = None,
    rank: int = 0,
    world_size: int = 1,
    advance: Advance | None = None,
) -> tuple[dict[str, float], Tensor]:
    """Samples `num` images, an equal number a class, each rank its share, and scores them all.

    Returns:
        (metrics of all scores and `steps_mean`, `steps_min`, `steps_max`, the same on every rank; this rank's images,
        uint8 [n, 3, H, W] on the CPU).

    Raises:
        UserError: `num` is not a multiple of the number of classes.
    """
    num_labels = module.network.num_labels
    if num % num_labels:
        raise UserError(f"num={num} is not a multiple of the {num_labels} classes: every class must come up equally")
    for score in scores.values():
        score.reset()
    images, steps = [], Rows(dtype=torch.int64).to(module.device)
    for batch in generate(
        module,
        equal_labels(num, range(num_labels)),
        batch_size=batch_size,
        seed=seed,
        sampler=sampler,
        rank=rank,
        world_size=world_size,
    ):
        for score in scores.values():
            score.update(batch.images, batch.labels.to(batch.images.device))
        images.append(batch.images.cpu())
        steps.update(batch.refined.steps.to(module.device))
        if advance is not None:
            advance(len(batch.ids))
    steps = steps.compute()
    metrics = {key: value for score in scores.values() for key, value in score.compute().items()}
    metrics |= {
        "steps_mean": steps.double().mean().item(),
        "steps_min": steps.min().item(),
        "steps_max": steps.max().item(),
    }
    return metrics, torch.cat(images)


def score_reconstructions(
    module: TokenizerModule, scores: Mapping[str, Any], datamodule: LightningDataModule, advance: Advance | None = None
) -> dict[str, float]:
    """Reconstructs the held-out split: PSNR, SSIM and L1, and every score of the reconstructions as `r<name>`."""
    reconstruction = ReconstructionScores(device=module.device)
    for batch in datamodule.split_dataloader("heldout"):
        real = as_images(batch["pixels"]).to(module.device)
        reconstructed = as_images(module.reconstruct(real.unsqueeze(2)))
        reconstruction.update(real, reconstructed)
        for score in scores.values():
            score.update(reconstructed, batch["label"].to(module.device))
        if advance is not None:
            advance(len(real))
    rated = {f"r{key}": value for score in scores.values() for key, value in score.compute().items()}
    return reconstruction.compute() | rated
