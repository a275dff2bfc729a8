"""Sampling by global refinement (DESIGN 1.6): fixed and entropy-guided schedules, one loop for every task.

A schedule says how far each sample's signal ratio t has come after so many steps. `refine_queue` is the loop: samples
that are done leave the batch and others from a queue take their places, each at a step of its own; `refine` is the same
for one batch. Everything that only watches (films, statistics, progress) is a callback that gets a `Step`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from grn import philox
from grn.errors import UserError
from grn.philox import Stream
from grn.refinement import shift


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
    """How many steps each sample takes, and where its signal ratio is after each of them (float64, on the CPU).

    `step` is one number for all samples, or int64 [B], of each its own.
    """

    max_steps: int
    decide_at: int | None  # the step whose entropy is handed to `plan`; None: nobody looks at it
    done_at: float  # a sample whose signal ratio has come this far takes its last samples whole and leaves the batch

    def plan(self, entropy: Tensor) -> Tensor:
        """Total number of steps int64 [B] from the normalised entropy [B] at step `decide_at`."""

    def signal_ratio(self, step: int | Tensor, total: Tensor) -> Tensor:
        """t [B] after `step` steps of `total` [B]; 0 at step 0, 1 when step == total."""

    def temperature_scale(self, step: int | Tensor, total: Tensor) -> Tensor:
        """A factor [B] on the temperature of step `step`."""


@dataclass(frozen=True)
class Linear:
    """t = i / N (the reference's default, N = 50)."""

    steps: int = 50
    decide_at: None = None
    done_at: ClassVar[float] = 1.0

    def __post_init__(self):
        _check(self.steps >= 1, "sampler.schedule.steps", "at least 1", self.steps)

    @property
    def max_steps(self) -> int:
        return self.steps

    def plan(self, entropy: Tensor) -> Tensor:
        return torch.full(entropy.shape, self.steps)

    def signal_ratio(self, step: int | Tensor, total: Tensor) -> Tensor:
        return step / total.double()

    def temperature_scale(self, step: int | Tensor, total: Tensor) -> Tensor:
        return torch.ones(total.shape, dtype=torch.float64)


@dataclass(frozen=True)
class Cosine(Linear):
    """t = 1 - cos(pi/2 * i/N): small steps while little is known, large ones at the end."""

    def signal_ratio(self, step: int | Tensor, total: Tensor) -> Tensor:
        return torch.where(total == step, 1.0, 1 - torch.cos(math.pi / 2 * (step / total.double())))


@dataclass(frozen=True)
class Shifted(Linear):
    """t = 0.999 * shift(i / (N-1), alpha), and the last samples whole: the reference's default of text (DESIGN 1.6).

    The last step thus sees the whole map of the one before, but for one token in a thousand. Above 1, `alpha` takes
    smaller steps while little is known (`grn.refinement.shift`); DESIGN tells none.
    """

    alpha: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _check(0 < self.alpha < math.inf, "sampler.schedule.alpha", "positive", self.alpha)

    def signal_ratio(self, step: int | Tensor, total: Tensor) -> Tensor:
        ratio = 0.999 * shift(step / (total.double() - 1).clamp(min=1), self.alpha)
        return torch.where(total == step, 1.0, ratio)


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
    done_at: ClassVar[float] = 0.99

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

    def signal_ratio(self, step: int | Tensor, total: Tensor) -> Tensor:
        step = torch.as_tensor(step).double()
        start = self.warmup / self.max_steps
        further = start + (1 - start) * (step - self.warmup) / (total - self.warmup)
        return torch.where(step <= self.warmup, step / self.max_steps, further)

    def temperature_scale(self, step: int | Tensor, total: Tensor) -> Tensor:
        scale = ((total - self.warmup - 10).double() / 40 + 0.5).clamp(0.5, 1.0)
        return torch.where(torch.as_tensor(step) < self.warmup, 1.0, scale)


@dataclass(frozen=True)
class Sampler:
    """Everything a user chooses about sampling (config group `sampler`).

    Args:
        schedule: `Linear`, `Cosine`, `Shifted` or `EntropyGuided`.
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
class Start:
    """Given tokens that samples start from (image to image), or of which they keep some (inpainting).

    With strength s a sample starts at the signal ratio t = 1 - s, from a map that holds each given token with that
    probability and else the sample's own noise, and takes those steps of its schedule that lead beyond t. An
    entropy-guided schedule decides as ever at step `warmup`, or, where t lies beyond that, at the first step, by the
    lower entropy of what is known there; the plan is that of a whole run, of which the steps beyond t are taken.

    Args:
        tokens: int64 [B, D, T, H, W], a map for each sample.
        strength: s in (0, 1]; 1 starts from noise alone.
        redraw: bool [B, 1, T, H, W], which positions are drawn; the others are as given in every map that the network
            sees, and in the result. None draws all.

    Raises:
        UserError: a strength outside (0, 1].
    """

    tokens: Tensor
    strength: float = 1.0
    redraw: Tensor | None = None

    def __post_init__(self):
        _check(0 < self.strength <= 1, "strength", "above 0 and at most 1", self.strength)

    def select(self, rows: Tensor) -> "Start":
        """Some of the B maps, by int64 on the CPU."""
        redraw = None if self.redraw is None else _rows(self.redraw, rows)
        return Start(_rows(self.tokens, rows), self.strength, redraw)

    def expand(self, number: int) -> "Start":
        """The one map of B = 1 for each of `number` samples."""
        redraw = None if self.redraw is None else self.redraw.expand(number, -1, -1, -1, -1)
        return Start(self.tokens.expand(number, -1, -1, -1, -1), self.strength, redraw)


@dataclass(frozen=True)
class Step:
    """What a callback sees of one step. `rows` int64 [n] (CPU) are the samples being refined, by their places in what
    `refine` or `refine_queue` was given.

    index: int64 [n] (CPU), how many steps each sample has taken before. t, t_next: float64 [n] on the CPU. entropy:
    float32 [n], normalised to [0, 1]. tokens: the map the network saw; predicted: the tokens sampled from it; kept:
    where the next map takes them (bool); all [n, D, T, H, W].
    """

    index: Tensor
    rows: Tensor
    t: Tensor
    t_next: Tensor
    entropy: Tensor
    tokens: Tensor
    predicted: Tensor
    kept: Tensor

    def select(self, rows: Tensor) -> "Step":
        """The same of some of the n samples: int64 on the CPU, places among the n."""
        return Step(**{name: _rows(value, rows) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Refined:
    """tokens int64 [B, D, T, H, W] on the device; the rest on the CPU.

    steps int64 [B]: taken. entropy float32 [B]: normalised, of the last prediction. decision_entropy float32 [B]: of
    the step whose entropy decides in an entropy-guided schedule; of the first step in a fixed one. trace float32
    [B, max_steps]: the normalised entropy of every step, NaN beyond the last. Given tokens that are never drawn do not
    count.
    """

    tokens: Tensor
    steps: Tensor
    entropy: Tensor
    decision_entropy: Tensor
    trace: Tensor


def refine(
    predict: Callable[[Tensor, Tensor, Condition], Tensor],
    condition: Condition,
    sampler: Sampler,
    *,
    shape: tuple[int, int, int, int],
    classes: int,
    seed: int,
    ids: Tensor,
    start: Start | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Refined:
    """Refines random tokens into one batch of samples; arguments as in `refine_queue`."""
    groups = refine_queue(
        predict,
        condition,
        sampler,
        shape=shape,
        classes=classes,
        seed=seed,
        ids=ids,
        batch_size=len(ids),
        start=start,
        callback=callback,
    )
    ((_, refined),) = groups
    return refined


@torch.no_grad()
def refine_queue(
    predict: Callable[[Tensor, Tensor, Condition], Tensor],
    condition: Condition,
    sampler: Sampler,
    *,
    shape: tuple[int, int, int, int],
    classes: int,
    seed: int,
    ids: Tensor,
    batch_size: int,
    start: Start | None = None,
    bucketed: bool = False,
    callback: Callable[[Step], None] | None = None,
) -> Iterator[tuple[Tensor, Refined]]:
    """Refines random tokens into samples, `batch_size` of them at a time; who is done leaves, and the next one enters.

    Args:
        predict: (tokens int64 [n, D, T, H, W], t float32 [n], condition of n rows) -> logits [n, classes, D, T, H, W].
        condition: of N rows, one a sample; a row is selected once, when its sample enters the batch.
        shape: (D, T, H, W) of one sample.
        seed, ids: a sample is a function of the seed and its id (int64 [N], on the device to sample on), whatever else
            stands in its batch, and whenever it enters.
        start: given tokens instead of noise alone.
        bucketed: pad the rows of every call of `predict` to a multiple of an eighth of `batch_size`, so that compiled
            graphs see few sizes.
        callback: called after every step.

    Yields:
        (rows int64 [B], Refined of B samples): places in `ids`, ascending; each time the next `batch_size` that are
        done, at last what is left.
    """
    _check(batch_size >= 1, "batch_size", "at least 1", batch_size)
    if bucketed:
        predict = _padded(predict, math.ceil(batch_size / 8))
    device, schedule = ids.device, sampler.schedule
    t_start = 0.0 if start is None else 1 - start.strength
    first, decided = int(_steps_until(t_start, schedule, torch.tensor([schedule.max_steps]))), 0
    if schedule.decide_at is not None:
        first = min(first, schedule.decide_at)
        decided = schedule.decide_at - first

    def enter(rows: Tensor) -> _Slots:
        entering = ids[_sent(rows, device)]
        noise = philox.integers(seed, Stream.INITIAL_TOKENS, entering, 0, shape, classes)
        tokens, free = noise, torch.ones(len(rows), 1, 1, 1, 1, device=device)
        if start is not None:
            given = _rows(start.tokens, rows)
            known = philox.uniform(seed, Stream.INITIAL_KEEP, entering, 0, shape) < t_start
            tokens = torch.where(known, given, noise)
            if start.redraw is not None:
                redraw = _rows(start.redraw, rows)
                tokens, noise = torch.where(redraw, tokens, given), torch.where(redraw, noise, given)
                free = redraw.float()
        return _Slots(
            rows=rows,
            taken=torch.zeros_like(rows),
            step=torch.full_like(rows, first),
            total=torch.full_like(rows, schedule.max_steps),
            condition=condition.select(rows),
            ids=entering,
            noise=noise,
            free=free,
            tokens=tokens,
            trace=torch.full((len(rows), schedule.max_steps), math.nan, device=device),
        )

    advance = partial(_advance, predict, sampler, seed, t_start)
    finishing = _finishing(enter, advance, len(ids), batch_size, callback)
    for rows, steps, tokens, trace in _groups(finishing, batch_size):
        order = rows.argsort()
        steps, trace = steps[order], trace.cpu()[order]
        refined = Refined(
            tokens=_rows(tokens, order),
            steps=steps,
            entropy=trace.gather(1, steps[:, None] - 1).squeeze(1),
            decision_entropy=trace[:, decided],
            trace=trace,
        )
        yield rows[order], refined


@dataclass
class _Slots:
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

    def select(self, rows: Tensor) -> "_Slots":
        picked = {name: _rows(value, rows) for name, value in vars(self).items() if name != "condition"}
        return _Slots(condition=self.condition.select(rows), **picked)

    def join(self, other: "_Slots") -> "_Slots":
        joined = {k: torch.cat([v, vars(other)[k]]) for k, v in vars(self).items() if k != "condition"}
        return _Slots(condition=self.condition.join(other.condition), **joined)


def _finishing(
    enter: Callable[[Tensor], _Slots],
    advance: Callable[[_Slots], Step],
    number: int,
    batch_size: int,
    callback: Callable[[Step], None] | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The loop, with the batch full while any of `number` samples wait: (rows, steps, tokens, trace) of who is done."""
    waiting, slots = torch.arange(number), None
    while slots is not None or len(waiting):
        room = batch_size - (0 if slots is None else len(slots.rows))
        if room and len(waiting):
            entering, waiting = enter(waiting[:room]), waiting[room:]
            slots = entering if slots is None else slots.join(entering)
        step = advance(slots)
        if callback is not None:
            callback(step)
        done = step.t_next == 1
        if done.any():
            leaving, staying = torch.nonzero(done).squeeze(1), torch.nonzero(~done).squeeze(1)
            yield tuple(_rows(value, leaving) for value in (slots.rows, slots.taken, slots.tokens, slots.trace))
            slots = slots.select(staying) if len(staying) else None


def _advance(predict: Callable, sampler: Sampler, seed: int, t_start: float, slots: _Slots) -> Step:
    """One step of every sample in the batch; nothing waits for the device, except where an entropy decides."""
    device, schedule, shape = slots.ids.device, sampler.schedule, tuple(slots.tokens.shape[1:])
    t = schedule.signal_ratio(slots.step, slots.total).clamp(min=t_start)
    logits, conditional = _guided_logits(predict, slots.tokens, t, slots.condition, sampler)
    entropy = normalized_entropy(conditional, slots.free).float()
    deciding = torch.nonzero(slots.step == schedule.decide_at).squeeze(1) if schedule.decide_at is not None else ()
    if len(deciding):
        plan = schedule.plan(_rows(entropy, deciding).cpu())
        slots.total[deciding] = plan
        slots.step[deciding] = _steps_until(t_start, schedule, plan).clamp(min=schedule.decide_at)
    t_next = schedule.signal_ratio(slots.step + 1, slots.total)
    t_next = torch.where(t_next >= schedule.done_at, 1.0, t_next)

    taken = _sent(slots.taken, device)
    temperature = _sent((sampler.temperature * schedule.temperature_scale(slots.step, slots.total)).float(), device)
    draws = philox.uniform(seed, Stream.TOKENS, slots.ids, taken, (2, *shape))
    predicted = sample_tokens(logits / _per_sample(temperature, logits), draws[:, 0])
    kept = draws[:, 1] < _per_sample(_sent(t_next.float(), device), slots.free) * slots.free
    step = Step(slots.taken, slots.rows, t, t_next, entropy, slots.tokens, predicted, kept)
    slots.trace.scatter_(1, taken[:, None], entropy[:, None])
    slots.tokens = torch.where(kept, predicted, slots.noise)
    slots.taken, slots.step = slots.taken + 1, slots.step + 1
    return step


def _steps_until(t: float, schedule: Schedule, total: Tensor) -> Tensor:
    """How many first steps of schedules of `total` int64 [B] steps do not lead beyond t (up to rounding): int64 [B]."""
    ratios = schedule.signal_ratio(torch.arange(1, schedule.max_steps + 1), total[:, None])
    return (ratios <= t + 1e-9).sum(dim=1)


def _groups(pieces: Iterable[tuple[Tensor, ...]], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of any number of rows -> the same rows, `size` at a time; what is left comes last."""
    held, count = [], 0
    for piece in pieces:
        held.append(piece)
        count += len(piece[0])
        if count >= size:
            whole = [torch.cat(parts) for parts in zip(*held)]
            yield tuple(part[:size] for part in whole)
            held, count = [tuple(part[size:] for part in whole)], count - size
    if count:
        yield tuple(torch.cat(parts) for parts in zip(*held))


def _padded(predict: Callable, multiple: int) -> Callable:
    """`predict` of a multiple of so many rows, the last one again and again; their logits are dropped."""

    def padded(tokens: Tensor, t: Tensor, condition: Condition) -> Tensor:
        count = len(tokens)
        if count % multiple == 0:
            return predict(tokens, t, condition)
        rows = torch.arange(count + -count % multiple).clamp(max=count - 1)
        return predict(_rows(tokens, rows), _rows(t, rows), condition.select(rows))[:count]

    return padded


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


def normalized_entropy(logits: Tensor, free: Tensor) -> Tensor:
    """Mean over the tokens to be drawn of the entropy divided by that of the uniform distribution.

    logits [B, classes, ...], free float32 that broadcasts to [B, ...], 0 where a token is given -> [B]; 0 if all are.
    What a network says of given tokens means nothing: of the first latents of clips, it has not learned to say any.
    """
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    share = free.flatten(1).mean(dim=1).clamp(min=torch.finfo(free.dtype).tiny)
    return (entropy * free).flatten(1).mean(dim=1) / share / math.log(logits.shape[1])


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """A few numbers from the CPU to the device; a plain `to` would first wait until the device has done all before."""
    return values.to(device, non_blocking=True)


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    """Some rows, by int64 on the CPU, of what is there or on a device."""
    return values[_sent(rows, values.device)]


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _check(holds: bool, key: str, needed: str, value: object) -> None:
    if not holds:
        raise UserError(f"{key} must be {needed}, got {value}")
