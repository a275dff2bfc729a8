"""Hierarchical binary quantization (HBQ): M binary decisions, each halving the step size.

Formulas: docs/method.md#hierarchical-binary-quantization.

A feature z in (-1, 1) starts at q = 0. In round m = 1..M the bit is 1 where z > q (strictly), and q moves by +-2^-m, so
that |z - q| <= 2^-M after M rounds. The functions here use the closed form of that loop: after M rounds q is the middle
of one of 2^M equal bins, open below and closed above. Scaling by a power of two and rounding up are exact in every
float type, so the closed form agrees with the loop bit for bit.

Labelings of a feature map [B, d, ...] (any number of trailing dimensions):

- `ind`: one index per channel in 2^M classes, first round = most significant bit: tokens [B, d, ...].
- `bit`: M binary tokens per channel, round-major (token channel m*d + c): tokens [B, M*d, ...].
"""

from typing import Literal

import torch
from torch import Tensor

Labeling = Literal["ind", "bit"]
MAX_ROUNDS = 8  # q is an odd multiple of 2^-M: beyond 8 significant bits bfloat16 cannot hold it


def quantize(z: Tensor, rounds: int) -> Tensor:
    """Moves every feature to the middle of its bin; gradients pass straight through.

    Args:
        z: features of any shape and float dtype, in [-1, 1] (values outside land in the outermost bins).
        rounds: M, 1..8.

    Returns:
        q like `z`, |z - q| <= 2^-M.
    """
    q = _bin_middle(_bin_index(z.detach(), rounds), rounds).to(z.dtype)
    return q + (z - z.detach())  # adds an exact zero whose gradient is that of z


def tokens(z: Tensor, rounds: int, labeling: Labeling) -> Tensor:
    """Features [B, d, ...] in [-1, 1] -> int64 tokens [B, D, ...] (D = d for `ind`, M*d for `bit`)."""
    index = _bin_index(z, rounds)
    return index if _is_ind(labeling) else index_to_bits(index, rounds)


def dequantize(tokens: Tensor, rounds: int, labeling: Labeling, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tokens [B, D, ...] of either labeling -> the quantized features [B, d, ...] they stand for."""
    index = tokens if _is_ind(labeling) else bits_to_index(tokens, rounds)
    return _bin_middle(index, rounds).to(dtype)


def index_to_bits(index: Tensor, rounds: int) -> Tensor:
    """`ind` tokens [B, d, ...] -> `bit` tokens [B, M*d, ...]."""
    return torch.cat([(index >> (rounds - 1 - m)) & 1 for m in range(rounds)], dim=1)


def bits_to_index(bits: Tensor, rounds: int) -> Tensor:
    """`bit` tokens [B, M*d, ...] -> `ind` tokens [B, d, ...]."""
    index = torch.zeros_like(bits[:, : bits.shape[1] // rounds])
    for plane in bits.chunk(rounds, dim=1):
        index = 2 * index + plane
    return index


def num_tokens(latent_channels: int, rounds: int, labeling: Labeling) -> tuple[int, int]:
    """(D, classes) of a feature map with `latent_channels` channels, for a refiner of this labeling."""
    return (latent_channels, 2**rounds) if _is_ind(labeling) else (latent_channels * rounds, 2)


def _bin_index(z: Tensor, rounds: int) -> Tensor:
    if not 1 <= rounds <= MAX_ROUNDS:
        raise ValueError(f"rounds must be in 1..{MAX_ROUNDS}, got {rounds}")
    half = 2 ** (rounds - 1)
    return (torch.ceil(z * half).long() + (half - 1)).clamp_(0, 2 * half - 1)


def _bin_middle(index: Tensor, rounds: int) -> Tensor:
    return (2 * index + (1 - 2**rounds)).float() * 2.0**-rounds


def _is_ind(labeling: str) -> bool:
    if labeling not in ("ind", "bit"):
        raise ValueError(f"labeling must be 'ind' or 'bit', got {labeling!r}")
    return labeling == "ind"
