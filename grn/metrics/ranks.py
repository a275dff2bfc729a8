"""What a score keeps, over all ranks: rows of every image in the order of the images, and totals."""

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat


class Rows(torchmetrics.Metric):
    """Collects rows [B, *shape] and gives back those of all ranks, [N, *shape].

    Image i of a set is taken to be scored by rank i mod ranks, as a DistributedSampler deals them; so the order of the
    rows, which the splits of the inception score depend on, is that of one process whatever the number of ranks.
    """

    full_state_update = False

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.shape = shape
        self.row_dtype = dtype
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.add_state("count", default=torch.zeros(1, dtype=torch.int64), dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forgets all rows."""
        super().reset()
        # A rank that gets no image must still take part in the gathering, with rows of this width and dtype.
        self.rows.append(torch.empty(0, *self.shape, dtype=self.row_dtype, device=self.device))

    def update(self, rows: Tensor) -> None:
        """Adds rows [B, *shape]."""
        self.rows.append(rows.detach().to(self.device, self.row_dtype))
        # Not in place, here and in `Totals`: the state may have been made in inference mode, by a validation epoch.
        self.count = self.count + len(rows)

    def compute(self) -> Tensor:
        """As `gathered`, but a single element comes as a scalar (torchmetrics squeezes it)."""
        counts = self.count.flatten()
        position = torch.cat([torch.arange(int(count), device=self.device) for count in counts])
        rank = torch.arange(len(counts), device=self.device).repeat_interleave(counts)
        return dim_zero_cat(self.rows)[torch.argsort(position * len(counts) + rank)]

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
        self.total = self.total + summand.detach().to(self.total.device, self.total.dtype)

    def compute(self) -> Tensor:
        """The total, [*shape]. Every rank must call it."""
        return self.total
