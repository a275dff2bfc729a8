"""Sampling many images from a trained refiner, batch by batch: for `grn.sample`, `grn.evaluate` and the callbacks."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grn.sampler import Refined, Sampler, Step
from grn.training import RefinerModule


@dataclass(frozen=True)
class Batch:
    """ids int64 [B]; labels int64 [B]; images uint8 [B, 3, H, W] on the module's device; what the sampler said."""

    ids: Tensor
    labels: Tensor
    images: Tensor
    refined: Refined


def generate(
    module: RefinerModule,
    labels: Tensor,
    *,
    batch_size: int,
    seed: int,
    sampler: Sampler | None = None,
    rank: int = 0,
    world_size: int = 1,
    watch_first: Callable[[Step], None] | None = None,
) -> Iterator[Batch]:
    """Samples image i of class `labels[i]` for all i, this rank its share.

    Image i depends on the seed and i alone, not on `batch_size` or `world_size`. `watch_first` is called after every
    step of the first batch.
    """
    callback = watch_first
    for chunk in torch.arange(rank, len(labels), world_size).split(batch_size):
        ids, chosen = chunk.to(module.device), labels[chunk].to(module.device)
        refined = module.generate(chosen, seed=seed, ids=ids, sampler=sampler, callback=callback)
        callback = None
        yield Batch(chunk, labels[chunk], module.decode(refined.tokens)[:, :, 0], refined)


def equal_labels(num: int, labels: list[int] | range) -> Tensor:
    """int64 [num]: `labels` again and again, so that each comes up equally often (within one)."""
    return torch.tensor(list(labels)).repeat(math.ceil(num / len(labels)))[:num]


def best_device(name: str | None) -> torch.device:
    """`name`, or the accelerator of this machine, or the CPU."""
    if name is not None:
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
