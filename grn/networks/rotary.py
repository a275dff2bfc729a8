"""Rotary position embeddings: 2-D, and 3-D over time, rows and columns (docs/method.md#rotary-positions)."""

import torch
from torch import Tensor

ROWS_3D = (1024, 256, 256)  # positions in time, of rows, of columns: all below these


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


def rotary_3d(
    positions: Tensor, head_dim: int, *, device: torch.device | None = None, base: float = 1e4
) -> tuple[Tensor, Tensor]:
    """Angles of tokens at whole-numbered places in time, row and column.

    A third of the head_dim/2 frequencies turns with the time, a third with the row, the rest with the column; each
    of the three counts its own base^(-i / count).

    Args:
        positions: int64 [N, 3], below `ROWS_3D`.
        device: where the angles go; None: where the positions are.

    Returns:
        (cos, sin): float32 [N, head_dim/2] each.
    """
    third = head_dim // 6
    positions = positions.to(device, non_blocking=True)
    cos, sin = [], []
    # Few places and many tokens: the angles of every place, in float64 on the CPU, and then rows of them.
    for axis, (rows, count) in enumerate(zip(ROWS_3D, (third, third, head_dim // 2 - 2 * third))):
        frequencies = base ** (-torch.arange(count, dtype=torch.float64, device="cpu") / count)
        angles = torch.arange(rows, dtype=torch.float64, device="cpu")[:, None] * frequencies
        for tables, table in ((cos, angles.cos()), (sin, angles.sin())):
            tables.append(table.float().to(positions.device, non_blocking=True)[positions[:, axis]])
    return torch.cat(cos, dim=1), torch.cat(sin, dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns adjacent pairs of the last dimension: x [..., N, head_dim], cos and sin [N, head_dim/2] -> like x.

    At least in float32.
    """
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)
