"""Rotary position embedding over a 2-D map of tokens (DESIGN 1.4)."""

import torch
from torch import Tensor


def rotary_2d(height: int, width: int, head_dim: int, *, base: float = 1e4) -> tuple[Tensor, Tensor]:
    """Angles of a map's tokens, row by row: (cos, sin), float32 [height*width, head_dim/2] each.

    The first half of the frequencies turns with the row, the second with the column; each half counts its own
    base^(-2i / (head_dim/2)). Frequency i turns the adjacent pair (2i, 2i + 1) of a head.
    """
    frequencies = base ** (-torch.arange(0, head_dim // 2, 2, dtype=torch.float64) / (head_dim // 2))
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns adjacent pairs of the last dimension: x [..., N, head_dim], cos and sin [N, head_dim/2] -> like x.

    At least in float32.
    """
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)
