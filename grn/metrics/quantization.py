"""Scores of each round of HBQ: the entropy of its bit and the error that remains after it."""

import torch
import torchmetrics
from torch import Tensor

from grn.method import hbq
from grn.runtime.errors import UserError


class QuantizationScores(torchmetrics.Metric):
    """Statistics of features on their way through the rounds, over batches and ranks.

    For each round m = 1..M `compute` gives
    - `bit_entropy_m`: the entropy in bits of the bit of round m, mean over the channels: 1 where both values come up
      equally often, less where the round is partly wasted;
    - `error_m`: mean |z - q| after m rounds, and `error_max_m`: the largest; no feature exceeds 2^-m.

    Args:
        channels: z, of the tokenizer.
        rounds: M.
    """

    full_state_update = False

    def __init__(self, channels: int, rounds: int):
        super().__init__()
        self.rounds = rounds
        self.add_state("count", default=torch.zeros(1, dtype=torch.int64), dist_reduce_fx="sum")  # positions
        self.add_state("ones", default=torch.zeros(rounds, channels, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("errors", default=torch.zeros(rounds, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("worst", default=torch.zeros(rounds, dtype=torch.float64), dist_reduce_fx="max")

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Adds features [B, z, T, h, w] in [-1, 1]."""
        features = features.float()
        bits = hbq.tokens(features, self.rounds, "bit").unflatten(1, (self.rounds, -1))
        errors = [(features - hbq.quantize(features, m)).abs() for m in range(1, self.rounds + 1)]
        # Not in place: the states may have been made in inference mode, by a validation epoch.
        self.count = self.count + features[:, 0].numel()
        self.ones = self.ones + bits.transpose(0, 1).transpose(1, 2).flatten(2).sum(dim=2)
        self.errors = self.errors + torch.stack([error.double().mean(dim=1).sum() for error in errors])
        self.worst = torch.maximum(self.worst, torch.stack([error.max().double() for error in errors]))

    def compute(self) -> dict[str, float]:
        """The scores of all features given since the last `reset`, over all ranks; every rank must call it.

        Raises:
            UserError: no features were given.
        """
        if not self.count:
            raise UserError("quantization scores: no images to encode: the split is empty")
        share = self.ones.double() / self.count
        entropy = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)) / torch.log(share.new_tensor(2.0))
        columns = {
            "bit_entropy": entropy.mean(dim=1).tolist(),
            "error": (self.errors / self.count).tolist(),
            "error_max": self.worst.tolist(),
        }
        return {f"{name}_{m}": values[m - 1] for name, values in columns.items() for m in range(1, self.rounds + 1)}
