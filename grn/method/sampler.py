"""Sampling by global refinement: what is chosen about it, and one step of it (docs/method.md#sampling).

A schedule says how far each sample's signal ratio t has come after so many steps; `advance` takes one step of every
sample in a batch, each at a step of its own. The loop is `grn.sampling.refinement`.
Everything that only watches (films, statistics, progress) is a callback that gets a `Step`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from grn.method import philox
from grn.method.philox import Stream
from grn.method.psi import FORMS, UPDATES, Form, Update, kappa_at, reverse_shares, reverse_step
from grn.method.schedules import MAX_STEPS, Linear, Schedule
from grn.runtime.errors import UserError, check, check_kinds


class Condition(Protocol):
    """What a batch of samples is conditioned on; rows can be taken, joined, and replaced by "no condition"."""

    def __len__(self) -> int: ...
    def select(self, rows: Tensor) -> Self: ...
    def null(self) -> Self: ...
    def join(self, other: Self) -> Self: ...


@dataclass(frozen=True)
class Sampler:
    """Everything a user chooses about sampling (config group `sampler`).

    Args:
        schedule: `Linear`, `Cosine`, `Shifted` or `EntropyGuided`.
        temperature: the logits are divided by it; above 1 for more variety.
        guidance: s in u + s*(c - u), with c and u the logits with and without condition.
        guidance_interval: guidance acts where low < t < high, and at t = 0 where low is 0; elsewhere the unconditional
            pass is not computed.
        update: `redraw` (the authors': each step draws all tokens anew) or `psi` (grn.method.psi: a step goes on from
            what is there).
        kappa: of psi, in [0, 1]: the share of tokens that take the exact reverse step; 0 is `redraw`.
        kappa_form: `constant` or `rescaled`.
        kappa_window: of t; outside of low <= t < high all tokens take the reverse step.
    """

    schedule: Schedule = field(default_factory=Linear)
    temperature: float = 1.0
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    update: Update = "redraw"
    kappa: float = 1.0
    kappa_form: Form = "constant"
    kappa_window: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        check_kinds(self, "sampler", most=MAX_STEPS)
        check(self.temperature > 0, "sampler.temperature", "positive", self.temperature)
        for name in ("guidance_interval", "kappa_window"):
            low, high = getattr(self, name)
            check(0 <= low <= high <= 1, f"sampler.{name}", "[low, high] within [0, 1]", [low, high])
            object.__setattr__(self, name, (low, high))  # of configs and files, lists
        for name, known in (("update", UPDATES), ("kappa_form", FORMS)):
            check(getattr(self, name) in known, f"sampler.{name}", f"one of {', '.join(known)}", getattr(self, name))
        check(0 <= self.kappa <= 1, "sampler.kappa", "within 0 and 1", self.kappa)

    def guides(self, t: Tensor) -> Tensor:
        """Where guidance acts: signal ratios of any shape -> bool of that shape."""
        low, high = self.guidance_interval
        return ((t >= 0 if low == 0 else t > low) & (t < high)) & (self.guidance != 1.0)


@dataclass(frozen=True)
class Step:
    """What a callback sees of one step. `rows` int64 [n] (CPU) are the samples being refined, by their places in what
    `Refinement` was given.

    index: int64 [n] (CPU), how many steps each sample has taken before. t, t_next: float64 [n] on the CPU. entropy:
    float32 [n], normalized to [0, 1]. tokens: the map the network saw; predicted: the tokens sampled from it, and those
    that are given; kept: where the next map takes them (bool); stayed: where it has the tokens of this one (bool);
    token_entropy: of each token's conditional prediction, in nats; all [n, D, T, H, W].
    """

    index: Tensor
    rows: Tensor
    t: Tensor
    t_next: Tensor
    entropy: Tensor
    tokens: Tensor
    predicted: Tensor
    kept: Tensor
    stayed: Tensor
    token_entropy: Tensor

    def select(self, rows: Tensor) -> "Step":
        """The same of some of the n samples: int64 on the CPU, places among the n."""
        return Step(**{name: select_rows(value, rows) for name, value in vars(self).items()})


@dataclass
class Slots:
    """The n samples in the batch. Counters, like t and the plans, are on the CPU, so that no step waits for the device.

    On the CPU, int64 [n]: `rows`, places in the queue; `taken`, steps so far; `step`, where in its schedule the sample
    is; `total`, of the schedule. On the device: `ids`; `noise` [n, D, T, H, W], what tokens are that are not drawn yet;
    `free` float32, broadcast to that, 0 where they never are; `tokens`, the map; `trace` [n, max_steps], the entropies.
    """

    rows: Tensor
    taken: Tensor
    step: Tensor
    total: Tensor
    condition: Condition
    ids: Tensor
    noise: Tensor
    free: Tensor
    tokens: Tensor
    trace: Tensor

    def select(self, rows: Tensor) -> "Slots":
        picked = {name: select_rows(value, rows) for name, value in vars(self).items() if name != "condition"}
        return Slots(condition=self.condition.select(rows), **picked)

    def join(self, other: "Slots") -> "Slots":
        joined = {k: torch.cat([v, vars(other)[k]]) for k, v in vars(self).items() if k != "condition"}
        return Slots(condition=self.condition.join(other.condition), **joined)


def advance(
    predict: Callable, draw: Callable, sampler: Sampler, seed: int | Tensor, t_start: float, slots: Slots
) -> Step:
    """One step of every sample in the batch; nothing waits for the device, except where an entropy decides."""
    device, schedule = slots.ids.device, sampler.schedule
    t = schedule.signal_ratio(slots.step, slots.total).clamp(min=t_start)
    logits, conditional = _guided_logits(predict, slots.tokens, t, slots.condition, sampler)
    entropies = token_entropies(conditional)
    entropy = normalized_entropy(entropies, slots.free, conditional.shape[1]).float()
    if schedule.decide_at is not None and len(deciding := torch.nonzero(slots.step == schedule.decide_at).squeeze(1)):
        decisive = select_rows(entropy, deciding).cpu()
        check_finite(decisive, sampler)
        plan = schedule.plan(decisive)
        slots.total[deciding] = plan
        slots.step[deciding] = steps_until(t_start, schedule, plan).clamp(min=schedule.decide_at)
    t_next = schedule.signal_ratio(slots.step + 1, slots.total)
    t_next = torch.where(t_next >= schedule.done_at, 1.0, t_next)

    taken = send(slots.taken, device)
    temperature = send((sampler.temperature * schedule.temperature_scale(slots.step, slots.total)).float(), device)
    shares = None
    if sampler.update == "psi":
        classes = torch.full_like(t, conditional.shape[1])
        kappa = kappa_at(t, t_next, sampler.kappa, sampler.kappa_form, sampler.kappa_window)
        told = (*reverse_shares(t, t_next, conditional.shape[1]), classes, kappa)
        shares = tuple(send(share.float(), device) for share in told)
    drawn = draw(
        seed, taken, logits, entropy, temperature, send(t_next.float(), device), shares,
        ids=slots.ids, tokens=slots.tokens, noise=slots.noise, free=slots.free,
    )  # fmt: skip
    predicted, kept, stayed, following, entropy = drawn
    step = Step(slots.taken, slots.rows, t, t_next, entropy, slots.tokens, predicted, kept, stayed, entropies)
    slots.trace.scatter_(1, taken[:, None], entropy[:, None])
    slots.tokens = following
    slots.taken, slots.step = slots.taken + 1, slots.step + 1
    return step


def draw(
    seed: int | Tensor,
    taken: Tensor,
    logits: Tensor,
    entropy: Tensor,
    temperature: Tensor,
    t_next: Tensor,
    shares: tuple[Tensor, ...] | None,
    *,
    ids: Tensor,
    tokens: Tensor,
    noise: Tensor,
    free: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The part of a step that is on the device alone: one graph, of n samples.

    Args:
        shares: of psi, those of `reverse_shares`, the number of classes and kappa, float32 [n] each; None redraws.

    Returns:
        predicted, kept, stayed, the tokens that follow, and the entropy, NaN where logits are not finite.
    """
    draws = philox.uniform(seed, Stream.TOKENS, ids, taken, (2, *tokens.shape[1:]))
    scaled = logits / _per_sample(temperature, logits)
    predicted = torch.where(free > 0, sample_tokens(scaled, draws[:, 0]), noise)
    # NaN in the trace, which is looked at when samples are done: nobody waits for the device here.
    entropy = torch.where(torch.stack(scaled.flatten(1).aminmax(dim=1)).isfinite().all(dim=0), entropy, math.nan)
    kept = draws[:, 1] < _per_sample(t_next, free) * free
    stayed, following = torch.zeros_like(kept), torch.where(kept, predicted, noise)
    if shares is not None:
        *reverse, kappa = (_per_sample(share, free) for share in shares)
        chosen, moved, left, as_predicted = reverse_step(seed, ids, taken, tokens, predicted, tuple(reverse), kappa)
        chosen, stayed = chosen & (free > 0), left & (free > 0)
        following, kept = torch.where(chosen, moved, following), torch.where(chosen, as_predicted, kept)
    return predicted, kept, stayed, following, entropy


def check_finite(entropy: Tensor, sampler: Sampler) -> None:
    """Of samples that were refined, on the CPU."""
    if not entropy.isfinite().all():
        raise UserError(
            f"the refiner's logits are not finite with {sampler}: its weights are damaged, or its training diverged; "
            "take an earlier checkpoint, or nearer values of sampler.guidance and sampler.temperature"
        )


def steps_until(t: float, schedule: Schedule, total: Tensor) -> Tensor:
    """How many first steps of schedules of `total` int64 [B] steps do not lead beyond t (up to rounding): int64 [B]."""
    ratios = schedule.signal_ratio(torch.arange(1, schedule.max_steps + 1), total[:, None])
    return (ratios <= t + 1e-9).sum(dim=1)


def _guided_logits(
    predict: Callable, tokens: Tensor, t: Tensor, condition: Condition, sampler: Sampler
) -> tuple[Tensor, Tensor]:
    """(guided, conditional) logits; one call of the network, with unconditional rows for the samples that need them."""
    guided = torch.nonzero(sampler.guides(t)).squeeze(1)
    if len(guided) == 0:
        conditional = predict(tokens, send(t.float(), tokens.device), condition)
        return conditional, conditional
    rows = send(guided, tokens.device)
    logits = predict(
        torch.cat([tokens, tokens[rows]]),
        send(torch.cat([t, t[guided]]).float(), tokens.device),
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


def token_entropies(logits: Tensor) -> Tensor:
    """The entropy of each token's distribution in nats: logits [B, classes, ...] -> [B, ...]."""
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def normalized_entropy(entropies: Tensor, free: Tensor, classes: int) -> Tensor:
    """Mean over the tokens to be drawn of the entropy divided by that of the uniform distribution.

    entropies [B, ...] in nats, free float32 that broadcasts to it, 0 where a token is given -> [B]; 0 if all are.
    What a network says of given tokens means nothing: of the first latents of clips, it has not learned to say any.
    """
    share = free.flatten(1).mean(dim=1).clamp(min=torch.finfo(free.dtype).tiny)
    return (entropies * free).flatten(1).mean(dim=1) / share / math.log(classes)


def send(values: Tensor, device: torch.device) -> Tensor:
    """A few numbers from the CPU to the device; a plain `to` would first wait until the device has done all before."""
    return values.to(device, non_blocking=True)


def select_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Some rows, by int64 on the CPU, of what is there or on a device."""
    return values[send(rows, values.device)]


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
