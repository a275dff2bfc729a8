"""Sampling many images from a trained refiner, the batch always full: for `grn.sample`, `grn.evaluate`, callbacks."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial

import torch
from torch import Tensor

from grn.errors import UserError, check_count
from grn.sampler import Refined, Sampler, Start, Step
from grn.training import RefinerModule

DECODED_PIXELS = 2**22  # that are decoded at once: those of 64 images of 256x256


@dataclass(frozen=True)
class Batch:
    """ids int64 [B], ascending; labels int64 [B]; what the sampler said; tokens -> pixels, as the module's `decode`."""

    ids: Tensor
    labels: Tensor
    refined: Refined
    decode: Callable[[Tensor], Tensor]

    @cached_property
    def pixels(self) -> Tensor:
        """uint8 [B, 3, T, H, W] on the module's device."""
        return self.decode(self.refined.tokens)

    @cached_property
    def images(self) -> Tensor:
        """The first frames, uint8 [B, 3, H, W]: all there is of images; of clips no others are decoded."""
        tokens = self.refined.tokens
        return (self.pixels if tokens.shape[2] == 1 else self.decode(tokens[:, :, :1]))[:, :, 0]


def generate(
    module: RefinerModule,
    labels: Tensor,
    *,
    batch_size: int,
    seed: int,
    sampler: Sampler | None = None,
    start: Start | None = None,
    rank: int = 0,
    world_size: int = 1,
    watch_first: Callable[[Step], None] | None = None,
) -> Iterator[Batch]:
    """Samples image i of class `labels[i]` for all i, this rank its share, in the order in which they are done.

    Image i depends on the seed and i alone, not on `batch_size` or `world_size`.

    Args:
        batch_size: samples refined at a time; batches have fewer where these would be more than `DECODED_PIXELS`, and
            a clip that is more alone is decoded in a stream.
        start: given tokens to start from, one map (B = 1) for all images.
        watch_first: called after every step of the first `batch_size` samples, of what is left of them.

    Raises:
        UserError: a `batch_size` that is none.
    """
    check_count("batch_size", batch_size)
    ids = torch.arange(len(labels))[rank::world_size]
    if start is not None:
        start = start.expand(len(ids))
    finished = module.generate_queue(
        labels[ids].to(module.device),
        seed=seed,
        ids=ids.to(module.device),
        batch_size=batch_size,
        sampler=sampler,
        start=start,
        callback=None if watch_first is None else partial(_watch, watch_first, batch_size),
    )
    _, latents, height, width = module.token_shape
    frames = 1 + (latents - 1) * module.tokenizer.temporal_stride
    pixels = frames * height * width * module.tokenizer.stride**2
    decode = module.decode if pixels <= DECODED_PIXELS else partial(_decode_long, module)
    count = max(1, DECODED_PIXELS // pixels)
    for rows, refined in finished:
        for first in range(0, len(rows), count):
            part = slice(first, first + count)
            chunk, own = ids[rows[part]], (getattr(refined, field.name)[part] for field in fields(refined))
            yield Batch(chunk, labels[chunk], Refined(*own), decode)


def _decode_long(module: RefinerModule, tokens: Tensor) -> Tensor:
    return torch.stack(list(module.decode_stream(tokens)), dim=2)


def _watch(callback: Callable[[Step], None], number: int, step: Step) -> None:
    """Calls back with what a step does to the first `number` samples, while it does anything to them."""
    rows = torch.nonzero(step.rows < number).squeeze(1)
    if len(rows):
        callback(step.select(rows))


def check_labels(labels: Sequence[object], num_labels: int) -> None:
    """Raises:
    UserError: something that is no label, or no label at all.
    """
    if not labels or any(not isinstance(label, int) or not 0 <= label < num_labels for label in labels):
        raise UserError(f"labels={labels}: labels of this checkpoint are 0..{num_labels - 1}")


def equal_labels(num: int, labels: list[int] | range) -> Tensor:
    """int64 [num]: `labels` again and again, so that each comes up equally often (within one)."""
    return torch.tensor(list(labels)).repeat(math.ceil(num / len(labels)))[:num]


def best_device(name: str | None) -> torch.device:
    """`name`, or the accelerator of this machine, or the CPU."""
    if name is not None:
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
