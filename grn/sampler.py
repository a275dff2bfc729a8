"""Sampling by global refinement (DESIGN 1.6): fixed and entropy-guided schedules, one loop for every task.

A schedule says how far each sample's signal ratio t has come after so many steps; `refine` is the loop. Everything that
only watches (films, statistics, progress) is a callback that gets a `Step`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from grn import philox
from grn.errors import UserError
from grn.philox import Stream

DONE = 0.99  # a sample whose signal ratio has come this far takes its last samples whole and leaves the batch


class Condition(Protocol):
    """What a batch of samples is conditioned on; rows can be taken, joined, and replaced by "no condition"."""

    def __len__(self) -> int: ...
    def select(self, rows: Tensor) -> "Condition": ...
    def null(self) -> "Condition": ...
    def join(self, other: "Condition") -> "Condition": ...


@dataclass(frozen=True)
class Labels:
    """Class labels int64 [B]; `null_label` is the class that stands for no condition."""

    index: Tensor
    null_label: int

    def __len__(self) -> int:
        return len(self.index)

    def select(self, rows: Tensor) -> "Labels":
        return Labels(self.index[_sent(rows, self.index.device)], self.null_label)

    def null(self) -> "Labels":
        return Labels(torch.full_like(self.index, self.null_label), self.null_label)

    def join(self, other: "Labels") -> "Labels":
        return Labels(torch.cat([self.index, other.index]), self.null_label)


class Schedule(Protocol):
    """How many steps each sample takes, and where its signal ratio is after each of them (float64, on the CPU)."""

    max_steps: int
    decide_at: int | None  # the step whose entropy is handed to `plan`; None: nobody looks at it

    def plan(self, entropy: Tensor) -> Tensor:
        """Total number of steps int64 [B] from the normalised entropy [B] at step `decide_at`."""

    def signal_ratio(self, step: int, total: Tensor) -> Tensor:
        """t [B] after `step` steps of `total` [B]; 0 at step 0, 1 when step == total."""

    def temperature_scale(self, step: int, total: Tensor) -> Tensor:
        """A factor [B] on the temperature of step `step`."""


@dataclass(frozen=True)
class Linear:
    """t = i / N (the reference's default, N = 50)."""

    steps: int = 50
    decide_at: None = None

    def __post_init__(self):
        _check(self.steps >= 1, "sampler.schedule.steps", "at least 1", self.steps)

    @property
    def max_steps(self) -> int:
        return self.steps

    def plan(self, entropy: Tensor) -> Tensor:
        return torch.full(entropy.shape, self.steps)

    def signal_ratio(self, step: int, total: Tensor) -> Tensor:
        return step / total.double()

    def temperature_scale(self, step: int, total: Tensor) -> Tensor:
        return torch.ones(total.shape, dtype=torch.float64)


@dataclass(frozen=True)
class Cosine(Linear):
    """t = 1 - cos(pi/2 * i/N): small steps while little is known, large ones at the end."""

    def signal_ratio(self, step: int, total: Tensor) -> Tensor:
        return torch.where(total == step, 1.0, 1 - torch.cos(math.pi / 2 * step / total.double()))


@dataclass(frozen=True)
class EntropyGuided:
    """More steps for samples whose tokens are less certain (DESIGN 1.6; the constants are the reference's for B).

    The first `warmup` steps advance t by 1/max_steps each. At step `warmup` the sample's entropy E (mean over tokens of
    the conditional prediction's entropy / log2(classes), in [0, 1]) decides on
    clip(round(scale*E + offset), min_steps - warmup, max_steps - warmup) further steps, which share what is left of t
    evenly. From there on the temperature is scaled by clip((further - 10)/40 + 0.5, 0.5, 1).
    """

    warmup: int = 5
    scale: float = 700.0
    offset: float = -620.0
    min_steps: int = 20
    max_steps: int = 50

    def __post_init__(self):
        _check(self.warmup >= 1, "sampler.schedule.warmup", "at least 1", self.warmup)
        _check(self.min_steps > self.warmup, "sampler.schedule.min_steps", "above warmup", self.min_steps)
        _check(self.max_steps >= self.min_steps, "sampler.schedule.max_steps", "at least min_steps", self.max_steps)

    @property
    def decide_at(self) -> int:
        return self.warmup

    def plan(self, entropy: Tensor) -> Tensor:
        further = torch.round(self.scale * entropy.double() + self.offset)
        return self.warmup + further.clamp(self.min_steps - self.warmup, self.max_steps - self.warmup).long()

    def signal_ratio(self, step: int, total: Tensor) -> Tensor:
        if step <= self.warmup:
            return torch.full(total.shape, step / self.max_steps, dtype=torch.float64)
        start = self.warmup / self.max_steps
        return start + (1 - start) * (step - self.warmup) / (total - self.warmup).double()

    def temperature_scale(self, step: int, total: Tensor) -> Tensor:
        if step < self.warmup:
            return torch.ones(total.shape, dtype=torch.float64)
        return ((total - self.warmup - 10).double() / 40 + 0.5).clamp(0.5, 1.0)


@dataclass(frozen=True)
class Sampler:
    """Everything a user chooses about sampling (config group `sampler`).

    Args:
        schedule: `Linear`, `Cosine` or `EntropyGuided`.
        temperature: the logits are divided by it; above 1 for more variety.
        guidance: s in u + s*(c - u), with c and u the logits with and without condition.
        guidance_interval: guidance acts where low < t < high; elsewhere the unconditional pass is not computed.
    """

    schedule: Schedule = field(default_factory=Linear)
    temperature: float = 1.0
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        _check(self.temperature > 0, "sampler.temperature", "positive", self.temperature)
        low, high = self.guidance_interval
        _check(0 <= low <= high <= 1, "sampler.guidance_interval", "[low, high] within [0, 1]", [low, high])


@dataclass(frozen=True)
class Step:
    """What a callback sees of one step. `rows` int64 [n] (CPU) are the samples still being refined; the rest is theirs.

    t, t_next: float64 [n] on the CPU. entropy: float32 [n], normalised to [0, 1]. tokens: the map the network saw;
    predicted: the tokens sampled from it; kept: where the next map takes them (bool); all [n, D, T, H, W].
    """

    index: int
    rows: Tensor
    t: Tensor
    t_next: Tensor
    entropy: Tensor
    tokens: Tensor
    predicted: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Refined:
    """tokens int64 [B, D, T, H, W] on the device; the rest on the CPU.

    steps int64 [B]: taken. entropy float32 [B]: normalised, of the last prediction. decision_entropy float32 [B]: of
    the step whose entropy decides in an entropy-guided schedule; of step 0 in a fixed one.
    """

    tokens: Tensor
    steps: Tensor
    entropy: Tensor
    decision_entropy: Tensor


@torch.no_grad()
def refine(
    predict: Callable[[Tensor, Tensor, Condition], Tensor],
    condition: Condition,
    sampler: Sampler,
    *,
    shape: tuple[int, int, int, int],
    classes: int,
    seed: int,
    ids: Tensor,
    callback: Callable[[Step], None] | None = None,
) -> Refined:
    """Refines random tokens into samples.

    Args:
        predict: (tokens int64 [n, D, T, H, W], t float32 [n], condition of n rows) -> logits [n, classes, D, T, H, W].
        condition: of B rows.
        shape: (D, T, H, W) of one sample.
        seed, ids: a sample is a function of the seed and its id (int64 [B], on the device to sample on), whatever else
            stands in its batch.
        callback: called after every step.
    """
    device, schedule = ids.device, sampler.schedule
    noise = philox.integers(seed, Stream.INITIAL_TOKENS, ids, 0, shape, classes)
    tokens = noise.clone()
    steps = torch.full((len(ids),), schedule.max_steps)
    final_entropy, decision_entropy = torch.zeros(len(ids)), torch.zeros(len(ids))
    # The samples still in the batch. Like t and the plan they stay on the CPU, so that no step waits for the device.
    rows = torch.arange(len(ids))

    for index in range(schedule.max_steps):
        active = _sent(rows, device)
        t = schedule.signal_ratio(index, steps[rows])
        current = tokens[active]
        logits, conditional = _guided_logits(predict, current, t, condition.select(rows), sampler)
        entropy = normalized_entropy(conditional)
        if index == (schedule.decide_at or 0):
            decision_entropy[rows] = entropy.float().cpu()
            steps[rows] = schedule.plan(decision_entropy[rows])
        t_next = schedule.signal_ratio(index + 1, steps[rows])
        done = t_next >= DONE
        t_next = torch.where(done, 1.0, t_next)

        temperature = _sent((sampler.temperature * schedule.temperature_scale(index, steps[rows])).float(), device)
        draws = philox.uniform(seed, Stream.TOKENS, ids[active], index, (2, *shape))
        predicted = sample_tokens(logits / _per_sample(temperature, logits), draws[:, 0])
        kept = draws[:, 1] < _per_sample(_sent(t_next.float(), device), draws[:, 1])
        tokens[active] = torch.where(kept, predicted, noise[active])
        if callback is not None:
            callback(Step(index, rows, t, t_next, entropy, current, predicted, kept))
        if done.any():
            final_entropy[rows[done]] = entropy.float().cpu()[done]
            steps[rows[done]] = index + 1
            rows = rows[~done]
            if len(rows) == 0:
                break
    return Refined(tokens, steps, final_entropy, decision_entropy)


def _guided_logits(
    predict: Callable, tokens: Tensor, t: Tensor, condition: Condition, sampler: Sampler
) -> tuple[Tensor, Tensor]:
    """(guided, conditional) logits; one call of the network, with unconditional rows for the samples that need them."""
    low, high = sampler.guidance_interval
    guided = torch.nonzero((t > low) & (t < high) & (sampler.guidance != 1.0)).squeeze(1)
    if len(guided) == 0:
        conditional = predict(tokens, _sent(t.float(), tokens.device), condition)
        return conditional, conditional
    rows = _sent(guided, tokens.device)
    logits = predict(
        torch.cat([tokens, tokens[rows]]),
        _sent(torch.cat([t, t[guided]]).float(), tokens.device),
        condition.join(condition.select(guided).null()),
    )
    conditional, unconditional = logits[: len(tokens)], logits[len(tokens) :]
    mixed = unconditional + sampler.guidance * (conditional[rows] - unconditional)
    return (mixed if len(guided) == len(tokens) else conditional.index_copy(0, rows, mixed)), conditional


def sample_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token of each categorical distribution by inversion of its cumulative distribution.

    logits [B, classes, ...] (float32 inside, or float64 where given), uniform [B, ...] in [0, 1) -> int64 [B, ...].
    """
    probabilities = torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)
    cumulative = probabilities[:, :-1].cumsum(dim=1)  # without the last class, rounding cannot reach past it
    return (cumulative <= uniform.unsqueeze(1)).sum(dim=1)


def normalized_entropy(logits: Tensor) -> Tensor:
    """Mean over tokens of the entropy divided by that of the uniform distribution: logits [B, classes, ...] -> [B]."""
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    return entropy.flatten(1).mean(dim=1) / math.log(logits.shape[1])


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """A few numbers from the CPU to the device; a plain `to` would first wait until the device has done all before."""
    return values.to(device, non_blocking=True)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _check(holds: bool, key: str, needed: str, value: object) -> None:
    if not holds:
        raise UserError(f"{key} must be {needed}, got {value}")
