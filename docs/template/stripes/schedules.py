"""A schedule of sampling."""

from dataclasses import dataclass

import torch
from torch import Tensor

from grn.method.schedules import Linear


@dataclass(frozen=True)
class Quadratic(Linear):
    """t = (i / N)^power: small steps while little is known."""

    power: float = 2.0

    def signal_ratio(self, step: int | Tensor, total: Tensor) -> Tensor:
        return torch.as_tensor(step / total.double()) ** self.power
