"""A score."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grn.metrics.ranks import Totals
from stripes.data import WIDTHS


class StripesRead:
    """The share of samples whose stripes are as wide as was asked for: the width whose pattern, at its best place, is
    nearest.

    Args:
        train, val: make an iterable of batches of the real data; not needed here.
        device: where the samples are.
        cache_dir: for what takes long to compute from the real data; not needed here.
    """

    def __init__(self, *, train: Any, val: Any, device: torch.device, cache_dir: Path):
        self.totals = Totals(2, dtype=torch.int64).to(device)

    def update(self, images: Tensor, labels: Tensor, ids: Tensor | None = None) -> None:
        """uint8 [B, 3, H, W], int64 [B], the samples' numbers int64 [B]."""
        rows = images.float().mean(dim=(1, 2)) / 127.5 - 1  # [B, W]
        fits = torch.stack([_best_fit(rows, width) for width in WIDTHS], dim=1)
        right = (fits.argmax(dim=1) == labels.to(rows.device)).sum()
        self.totals.update(torch.stack([right, torch.tensor(len(labels), device=rows.device)]))

    def compute(self) -> dict[str, float]:
        """The same on every rank, as `Totals` are sums over them."""
        right, count = self.totals.compute()
        return {"stripes_read": float(right / count)}

    def reset(self) -> None:
        self.totals.reset()


def _best_fit(rows: Tensor, width: int) -> Tensor:
    """The largest correlation [B] of rows [B, W] with stripes of this width."""
    places = torch.arange(rows.shape[1], device=rows.device)
    patterns = [((places + start).div(width, rounding_mode="floor") % 2 * 2.0 - 1) for start in range(2 * width)]
    return (rows @ torch.stack(patterns, dim=1)).amax(dim=1)
