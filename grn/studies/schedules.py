"""Controls of entropy-guided sampling: what is left of its effect without its temperature, or without the entropy."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from grn.method.schedules import EntropyGuided
from grn.sampling.bundle import RefinerBundle
from grn.sampling.calibration import decision_entropies, fit
from grn.sampling.request import Request


@dataclass(frozen=True)
class Unscaled(EntropyGuided):
    """Entropy-guided, at one temperature for all: `EntropyGuided` lowers it where few steps are taken."""

    def temperature_scale(self, step: int | Tensor, total: Tensor) -> Tensor:
        return torch.ones(total.shape, dtype=torch.float64)


@dataclass(frozen=True)
class Shuffled(EntropyGuided):
    """As many samples of every number of steps as in `plans`, int64 [N], but by lot: the entropy has no say."""

    plans: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def plan(self, entropy: Tensor) -> Tensor:
        return self.plans[torch.randint(len(self.plans), entropy.shape, generator=self.generator)]


@dataclass(frozen=True)
class ShuffledUnscaled(Shuffled, Unscaled):
    """Both."""


def warmup_of(steps: int) -> int:
    """Of an entropy-guided schedule of so many steps in the mean, as `calibrated` has it."""
    return max(1, round(steps / 6))


def calibrated(
    steps: int, bundle: RefinerBundle, request: Request, guidance: float, *, batch_size: int
) -> tuple[EntropyGuided, Tensor]:
    """Entropy-guided, of so many steps in the mean; limits in the proportions of the reference's.

    Args:
        request: the samples to calibrate with, whose sampler is the bundle's.

    Returns:
        (the schedule, the entropies float32 [N] of these samples at its deciding step).
    """
    guided = EntropyGuided(warmup=warmup_of(steps), min_steps=round(steps * 2 / 3), max_steps=round(steps * 5 / 3))
    sampler = replace(bundle.sampler, schedule=guided, guidance=guidance)
    entropy = decision_entropies(bundle, replace(request, sampler=sampler), batch_size=batch_size)
    return fit(guided, entropy, target=steps), entropy
