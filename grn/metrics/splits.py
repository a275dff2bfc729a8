"""Reads a split of the data as scores see it: images and labels.

A split is a callable that returns an iterable of batches, each a dict with `pixels` uint8 [B, 3, H, W] or
[B, 3, T, H, W], or of samples of several sizes a list of [3, T, H, W], and, where labels exist, `label` int64 [B]; of
clips, every frame counts as an image. Every call starts over and yields the whole split in one fixed order, on every
rank alike: what is computed from a split is the same everywhere and never reduced over ranks.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from grn.media.pixels import as_frames
from grn.runtime.errors import UserError

Split = Callable[[], Iterable[dict[str, Any]]]


def as_images(pixels: Tensor) -> Tensor:
    """Pixels of a batch, uint8 [B, 3, H, W] or [B, 3, T, H, W] -> images, uint8 [B*T, 3, H, W].

    Raises:
        UserError: pixels that are not uint8 in three channels.
    """
    if pixels.ndim == 5:
        pixels = as_frames(pixels)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != torch.uint8:
        raise UserError(f"scores read uint8 [B, 3, H, W] pixels, data gives {pixels.dtype} {list(pixels.shape)}")
    return pixels


def of_kind(split: Split, *, clips: bool, name: str) -> Split:
    """The clips of a split, or its images: what samples of that kind are compared with.

    Iterating raises:
        UserError: there are only samples of the other kind.
    """

    def batches() -> Iterator[dict[str, Any]]:
        found = others = False
        for batch in split():
            pixels = batch["pixels"]
            rows = [row for row, it in enumerate(pixels) if (it.ndim == 4 and it.shape[1] > 1) == clips]
            found, others = found or len(rows) > 0, others or len(rows) < len(pixels)
            if len(rows) == len(pixels):
                yield batch
            elif rows:
                yield {key: [values[row] for row in rows] for key, values in batch.items()}
        if others and not found:
            own, other = ("clips", "images") if clips else ("images", "clips")
            raise UserError(
                f"scores: samples are {own}, and the {name} split has only {other} to compare them with: give other "
                "data (data=...), or leave out the scores that read it (scores=none)"
            )

    return batches


def same_sizes(samples: Tensor | Sequence[Tensor]) -> Iterator[Tensor]:
    """The samples of a batch, in their order, in tensors [B, ...] of neighbors of one size."""
    if isinstance(samples, Tensor):
        yield samples
        return
    for _, same in groupby(samples, key=lambda sample: sample.shape):
        yield torch.stack(list(same))


def image_batches(split: Split, *, name: str) -> Iterator[Tensor]:
    """The images of a split, batch by batch: uint8 [B, 3, H, W].

    Raises:
        UserError: the split is empty.
    """
    empty = True
    for batch in split():
        empty = False
        yield from map(as_images, same_sizes(batch["pixels"]))
    if empty:
        raise UserError(f"scores: the {name} split has no images: prepare the data first (python -m grn.prepare)")


def labelled_images(split: Split, *, name: str) -> tuple[Tensor, Tensor]:
    """A whole split in memory, on the CPU: images uint8 [N, 3, H, W] and labels int64 [N].

    Raises:
        UserError: the split is empty or has no labels.
    """
    pixels, labels = [], []
    for batch in split():
        if "label" not in batch:
            raise UserError(f"scores: the {name} split has no labels, which this score needs: leave it out of scores")
        frames = as_images(batch["pixels"]).cpu()
        pixels.append(frames)
        labels.append(batch["label"].cpu().repeat_interleave(len(frames) // len(batch["label"])))
    if not pixels:
        raise UserError(f"scores: the {name} split has no images: prepare the data first (python -m grn.prepare)")
    return torch.cat(pixels), torch.cat(labels)


def image_digest(batches: Iterable[Tensor]) -> str:
    """SHA-256 (hex) of images uint8 [B, 3, H, W], the same however they are cut into batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for image in batch.cpu().numpy():
            digest.update(f"{image.shape}".encode())
            digest.update(image.tobytes())
    return digest.hexdigest()


def grey(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, H, W] in [0, 1], the mean of the colors."""
    return pixels.float().mean(dim=1) / 255
