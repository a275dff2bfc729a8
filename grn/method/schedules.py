"""Schedules (paper, sampling): how far the signal ratio of a sample has come after so many steps."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from grn.method.corruption import shift
from grn.runtime.errors import check, check_kinds

MAX_STEPS = 10_000  # every step is a call of the network
Grid = Literal["linear", "cosine", "shifted"]


class Schedule(Protocol):
    """How many steps each sample takes, and where its signal ratio is after each of them (float64, on the CPU).

    `step` is one number for all samples, or int64 [B], of each its own.
    """

    @property
    def max_steps(self) -> int: ...
    @property
    def decide_at(self) -> int | None:
        """The step whose entropy is handed to `plan`; None: nobody looks at it."""

    @property
    def done_at(self) -> float:
        """A sample whose signal ratio has come this far accepts all predictions and leaves the batch."""
        ...

    def plan(self, entropy: Tensor) -> Tensor:
        """Total number of steps int64 [B] from the normalized entropy [B] at step `decide_at`."""
        ...

    def signal_ratio(self, step: int | Tensor, total: Tensor) -> Tensor:
        """t [B] after `step` steps of `total` [B]; 0 at step 0, 1 when step == total."""
        ...

    def temperature_scale(self, step: int | Tensor, total: Tensor) -> Tensor:
        """A factor [B] on the temperature of step `step`."""
        ...


@dataclass(frozen=True)
class Linear:
    """t = i / N (the reference's default, N = 50)."""

    steps: int = 50
    decide_at: None = None
    grid: ClassVar[str] = "linear"

    def __post_init__(self):
        check_kinds(self, "sampler.schedule", most=MAX_STEPS)
        check(self.steps >= 1, "sampler.schedule.steps", "at least 1", self.steps)

    @property
    def max_steps(self) -> int:
        return self.steps

    @property
    def done_at(self) -> float:
        return 1.0

    def plan(self, entropy: Tensor) -> Tensor:
        return torch.full(entropy.shape, self.steps)

    def signal_ratio(self, step: int | Tensor, total: Tensor) -> Tensor:
        return step / total.double()

    def temperature_scale(self, step: int | Tensor, total: Tensor) -> Tensor:
        return torch.ones(total.shape, dtype=torch.float64)


@dataclass(frozen=True)
class Cosine(Linear):
    """t = 1 - cos(pi/2 * i/N): small steps while little is known, large ones at the end."""

    grid: ClassVar[str] = "cosine"

    def signal_ratio(self, step: int | Tensor, total: Tensor) -> Tensor:
        return torch.where(total == step, 1.0, _cosine(step / total.double()))


@dataclass(frozen=True)
class Shifted(Linear):
    """t = cap * (1 - cos(pi/2 * shift(u, alpha))) with u = min(1, i/(N-1)): the authors' schedule of text.

    All predictions of the last step are accepted: t reaches `cap` after N - 1 steps and 1 after N.

    Args:
        alpha: above 1 for smaller steps while little is known (`grn.method.corruption.shift`); 1 leaves u alone.
        cap: in (0, 1]; 0.999 in the authors' first release of text weights, 0.95 in that of June 2026.
    """

    alpha: float = 1.0
    cap: float = 0.999
    grid: ClassVar[str] = "shifted"

    def __post_init__(self):
        super().__post_init__()
        _check_shift(self.alpha, self.cap)

    def signal_ratio(self, step: int | Tensor, total: Tensor) -> Tensor:
        u = (step / (total.double() - 1).clamp(min=1)).clamp(max=1)
        return torch.where(total == step, 1.0, _shifted_cosine(u, self.alpha, self.cap))


@dataclass(frozen=True)
class EntropyGuided:
    """More steps for samples whose tokens are less certain (paper, entropy-guided sampling; the constants are the
    reference's for B).

    The first `warmup` steps advance u by 1/max_steps each. At step `warmup` the sample's entropy E (mean over tokens of
    the conditional prediction's entropy / log2(classes), in [0, 1]) decides on
    clip(round(scale*E + offset), min_steps - warmup, max_steps - warmup) further steps, which share what is left of u
    evenly. From there on the temperature is scaled by clip((further - 10)/40 + 0.5, 0.5, 1).

    Args:
        grid: how t follows u. `linear`: t = u (the reference). `cosine`: t = 1 - cos(pi/2 * u). `shifted`: as
            `Shifted` has it, so that a sample of `max_steps` steps takes the steps of `Shifted(max_steps)`.
        alpha, cap: of the grid `shifted`.
    """

    warmup: int = 5
    scale: float = 700.0
    offset: float = -620.0
    min_steps: int = 20
    max_steps: int = 50
    grid: Grid = "linear"
    alpha: float = 1.0
    cap: float = 0.999

    def __post_init__(self):
        check_kinds(self, "sampler.schedule", most=MAX_STEPS)
        check(self.warmup >= 1, "sampler.schedule.warmup", "at least 1", self.warmup)
        check(self.min_steps > self.warmup, "sampler.schedule.min_steps", "above warmup", self.min_steps)
        check(self.max_steps >= self.min_steps, "sampler.schedule.max_steps", "at least min_steps", self.max_steps)
        check(self.grid in get_args(Grid), "sampler.schedule.grid", f"one of {', '.join(get_args(Grid))}", self.grid)
        _check_shift(self.alpha, self.cap)

    @property
    def decide_at(self) -> int:
        return self.warmup

    @property
    def done_at(self) -> float:
        return 1.0 if self.grid == "shifted" else 0.99  # whose last step but one ends at the cap

    def plan(self, entropy: Tensor) -> Tensor:
        further = torch.round(self.scale * entropy.double() + self.offset)
        return self.warmup + further.clamp(self.min_steps - self.warmup, self.max_steps - self.warmup).long()

    def signal_ratio(self, step: int | Tensor, total: Tensor) -> Tensor:
        step = torch.as_tensor(step).double()
        at_cap = 1 if self.grid == "shifted" else 0  # the last step, before which u is 1 already
        start = self.warmup / (self.max_steps - at_cap)
        further = start + (1 - start) * (step - self.warmup) / (total - at_cap - self.warmup).clamp(min=1)
        u = torch.where(step <= self.warmup, step / (self.max_steps - at_cap), further)
        if self.grid == "linear":
            return u
        u = u.clamp(max=1)
        ratio = _cosine(u) if self.grid == "cosine" else _shifted_cosine(u, self.alpha, self.cap)
        return torch.where(step >= total, 1.0, ratio)

    def temperature_scale(self, step: int | Tensor, total: Tensor) -> Tensor:
        scale = ((total - self.warmup - 10).double() / 40 + 0.5).clamp(0.5, 1.0)
        return torch.where(torch.as_tensor(step) < self.warmup, 1.0, scale)


FIXED = {schedule.grid: schedule for schedule in (Linear, Cosine, Shifted)}  # by the grid they follow


def grid_of(schedule: Schedule) -> dict[str, Any]:
    """The keys of `EntropyGuided` that make it advance along the same grid as a schedule of this module."""
    settings = ("grid", "alpha", "cap") if getattr(schedule, "grid", None) == "shifted" else ("grid",)
    return {name: getattr(schedule, name) for name in settings if hasattr(schedule, name)}


def fixed(schedule: Schedule, steps: int) -> Linear:
    """The fixed schedule of so many steps along the grid of another."""
    found = grid_of(schedule)
    return FIXED[found.pop("grid", "linear")](steps, **found)


def _cosine(u: Tensor) -> Tensor:
    return 1 - torch.cos(math.pi / 2 * u)


def _shifted_cosine(u: Tensor, alpha: float, cap: float) -> Tensor:
    return cap * _cosine(shift(u, alpha))


def _check_shift(alpha: float, cap: float) -> None:
    check(0 < alpha < math.inf, "sampler.schedule.alpha", "positive", alpha)
    check(0 < cap <= 1, "sampler.schedule.cap", "above 0 and at most 1", cap)
