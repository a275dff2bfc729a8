"""Accumulators of scores over ranks: per-image rows in order, and totals."""

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from grn.runtime.ranks import rank_and_world_size


class Rows(torchmetrics.Metric):
    """Collects rows [B, *shape] and gives back those of all ranks, [N, *shape], in the order of their images.

    So that order, which the splits of the inception score depend on, is that of one process whatever the number of
    ranks. Rows of one id stay in the order in which they were given.
    """

    full_state_update = False
    rows: list[Tensor]
    ids: list[Tensor]

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.shape = shape
        self.row_dtype = dtype
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.add_state("ids", default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forgets all rows."""
        super().reset()
        # A rank that gets no image must still take part in the gathering, with rows of this width and dtype.
        self.rows.append(torch.empty(0, *self.shape, dtype=self.row_dtype, device=self.device))
        self.ids.append(torch.empty(0, dtype=torch.int64, device=self.device))
        self._count = 0

    def update(self, rows: Tensor, ids: Tensor | None = None) -> None:
        """Adds rows [B, *shape].

        Args:
            ids: int64 [B], by which the rows of all ranks are ordered; None: image i is scored by rank i mod ranks, as
                a DistributedSampler deals them.
        """
        if ids is None:
            rank, world_size = rank_and_world_size()
            ids = torch.arange(self._count, self._count + len(rows)) * world_size + rank
        self.rows.append(rows.detach().to(self.device, self.row_dtype))
        self.ids.append(ids.to(self.device))
        self._count += len(rows)

    def compute(self) -> Tensor:
        """As `gathered`, but a single element comes as a scalar (torchmetrics squeezes it)."""
        return dim_zero_cat(self.rows)[torch.argsort(dim_zero_cat(self.ids), stable=True)]

    def gathered(self) -> Tensor:
        """All rows, [N, *shape]. Every rank must call it."""
        return self.compute().reshape(-1, *self.shape)


class Totals(torchmetrics.Metric):
    """Sums tensors of one shape, of at least two elements, over batches and ranks, in `dtype`."""

    full_state_update = False

    def __init__(self, *shape: int, dtype: torch.dtype):
        super().__init__()
        self.add_state("total", default=torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def update(self, summand: Tensor) -> None:
        """Adds a tensor [*shape]."""
        # Not in place: the state may have been made in inference mode, by a validation epoch.
        self.total = self.total + summand.detach().to(self.total.device, self.total.dtype)

    def compute(self) -> Tensor:
        """The total, [*shape]. Every rank must call it."""
        return self.total
