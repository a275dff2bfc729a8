"""Counter-based random numbers: Philox4x32-10 (Salmon et al., Parallel random numbers, SC 2011).

A draw is a pure function of (seed, stream, sample id, step, element): what a sample draws does not depend on the batch
it stands in, on the rank that computes it, or on what was drawn before: a resumed run draws what the unbroken run
would have drawn, without any generator state in the checkpoint. Runs as tensor operations on any device.
"""

import math
from enum import IntEnum, unique

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


@unique
class Stream(IntEnum):
    """What a draw is for; no two uses share a stream."""

    SIGNAL_RATIO = 0
    KEEP = 1
    NOISE = 2
    CONDITION_DROPOUT = 3
    INITIAL_TOKENS = 4
    TOKENS = 5
    INITIAL_KEEP = 6
    CONTEXT = 7
    REVERSE = 8


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, ...]:
    """Ten rounds on int64 tensors that hold 32-bit words (broadcast against each other) -> four tensors of words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two 32-bit words fills 64 bits: int64 wraps, yet its bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # c1 and c3 keep their high words, which go when c0 and c2 are cut: two operators a round less.
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, p1, ((p0 >> 32) ^ c3 ^ k1) & _MASK, p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def uniform(seed: int | Tensor, stream: Stream, ids: Tensor, step: int | Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform float32 numbers in [0, 1), multiples of 2^-24.

    Args:
        seed: the run's seed, 64 bits; as an int64 tensor without dimensions it is no constant of a compiled graph.
        stream: what the draw is for.
        ids: int64 [B] in [0, 2^32), one per sample: its number in the whole run or in the global batch.
        step: which step of training or of sampling, in [0, 2^32); of each sample its own as int64 [B].
        shape: the shape of one sample's draw.

    Returns:
        [B, *shape] on the device of `ids`; row i depends on ids[i] and its step, not on the other rows.
    """
    count = math.prod(shape)
    block = torch.arange(-(-count // 4), device=ids.device)
    step = step[:, None] & _MASK if isinstance(step, Tensor) else torch.full_like(block, step & _MASK)
    words = philox4x32(
        (block, ids[:, None] & _MASK, step, torch.full_like(block, int(stream))),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    words = torch.stack(words, dim=-1).flatten(1)[:, :count]
    return ((words >> 8).to(torch.float32) * 2.0**-24).view(len(ids), *shape)


def integers(seed: int, stream: Stream, ids: Tensor, step: int | Tensor, shape: tuple[int, ...], high: int) -> Tensor:
    """Uniform int64 numbers in [0, high), [B, *shape]; arguments as in `uniform`."""
    return (uniform(seed, stream, ids, step, shape) * high).long()


def normal(seed: int, stream: Stream, ids: Tensor, step: int | Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal float32 numbers, [B, *shape]; arguments as in `uniform`."""
    u = uniform(seed, stream, ids, step, shape).double() + 2.0**-25  # the open interval: ndtri(0) is -inf
    return torch.special.ndtri(u).float()
