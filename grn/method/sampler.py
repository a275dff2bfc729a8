"""Sampling by global refinement: fixed and entropy-guided schedules, one loop for all tasks (docs/method.md#sampling).

A schedule says how far each sample's signal ratio t has come after so many steps. `Refinement` is the loop: samples
that are done leave the batch and others from a queue take their places, each at a step of its own. It is taken step by
step, and can be paused and changed between two steps. `finished` runs it to its end.
Everything that only watches (films, statistics, progress) is a callback that gets a `Step`.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from grn.method import philox
from grn.method.philox import Stream
from grn.method.psi import FORMS, UPDATES, kappa_at, reverse_shares, reverse_step
from grn.method.schedules import MAX_STEPS, Linear, Schedule
from grn.runtime.errors import UserError, check, check_kinds


class Condition(Protocol):
    """What a batch of samples is conditioned on; rows can be taken, joined, and replaced by "no condition"."""

    def __len__(self) -> int: ...
    def select(self, rows: Tensor) -> Self: ...
    def null(self) -> Self: ...
    def join(self, other: Self) -> Self: ...


ConditionT = TypeVar("ConditionT", bound=Condition)


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
    update: str = "redraw"
    kappa: float = 1.0
    kappa_form: str = "constant"
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
        check(0 < self.strength <= 1, "strength", "above 0 and at most 1", self.strength)

    def to(self, device: torch.device) -> "Start":
        return replace(
            self, tokens=self.tokens.to(device), redraw=None if self.redraw is None else self.redraw.to(device)
        )

    def select(self, rows: Tensor) -> "Start":
        """Some of the B maps, by int64 on the CPU."""
        redraw = None if self.redraw is None else _rows(self.redraw, rows)
        return Start(_rows(self.tokens, rows), self.strength, redraw)

    def expand(self, number: int) -> "Start":
        """The one map of B = 1 for each of `number` samples."""
        redraw = None if self.redraw is None else self.redraw.expand(number, -1, -1, -1, -1)
        return Start(self.tokens.expand(number, -1, -1, -1, -1), self.strength, redraw)


def given_latents(start: Start | None) -> int:
    """How many first latents all clips from `start` have as they were given: 0 without one."""
    if start is None or start.redraw is None:
        return 0
    return int((~start.redraw[:, 0]).transpose(0, 1).flatten(1).all(dim=1).long().cumprod(0).sum())


@dataclass(frozen=True)
class Erasure:
    """Tokens of one sample that are put back to noise while it is refined; the steps that follow draw them again.

    Args:
        sample: its place among those that are asked for.
        after: how many steps it has taken before.
        positions: bool [T, H, W] on the CPU.
    """

    sample: int
    after: int
    positions: Tensor


@dataclass(frozen=True)
class Step:
    """What a callback sees of one step. `rows` int64 [n] (CPU) are the samples being refined, by their places in what
    `Refinement` was given.

    index: int64 [n] (CPU), how many steps each sample has taken before. t, t_next: float64 [n] on the CPU. entropy:
    float32 [n], normalised to [0, 1]. tokens: the map the network saw; predicted: the tokens sampled from it, and those
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


def finished(
    refinement: "Refinement", batch_size: int, callback: Callable[[Step], None] | None = None
) -> Iterator[tuple[Tensor, Refined]]:
    """Runs a refinement to its end, and yields what is done.

    Args:
        callback: called after every step.

    Yields:
        (rows int64 [B], Refined of B samples): places in `ids`, ascending; each time the next `batch_size` that are
        done, at last what is left.
    """
    for step in refinement:
        if callback is not None:
            callback(step)
        if refinement.done >= batch_size:
            yield refinement.take(batch_size)
    if refinement.done:
        yield refinement.take(batch_size)


class Refinement:
    """Random tokens being refined into samples, `batch_size` of them at a time: an iterator over its steps.

    Each `next` takes a step of every sample in the batch; who is done leaves, and the next one enters. Between two
    steps nothing happens, so that it can be paused, and changed by `erase`.

    Args:
        predict: (tokens int64 [n, D, T, H, W], t float32 [n], condition of n rows) -> logits [n, classes, D, T, H, W].
        condition: of N rows, one a sample; a row is selected once, when its sample enters the batch.
        shape: (D, T, H, W) of one sample.
        seed, ids: a sample is a function of the seed and its id (int64 [N], on the device to sample on), whatever else
            stands in its batch, and whenever it enters.
        start: given tokens instead of noise alone.
        erasures: of samples by their places in `ids`.
        bucketed: pad the rows of every call of `predict` to a multiple of an eighth of `batch_size`, so that compiled
            graphs see few sizes.
        compiled: draws and what they change are one compiled graph, of 15 kernels in place of 174 operators (of psi a
            few more). Its softmax rounds otherwise, as a compiled network does.

    Attributes:
        done: how many samples are done and not taken yet.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, Tensor, ConditionT], Tensor],
        condition: ConditionT,
        sampler: Sampler,
        *,
        shape: tuple[int, int, int, int],
        classes: int,
        seed: int,
        ids: Tensor,
        batch_size: int,
        start: Start | None = None,
        erasures: Sequence[Erasure] = (),
        bucketed: bool = False,
        compiled: bool = False,
    ):
        check(batch_size >= 1, "batch_size", "at least 1", batch_size)
        self._predict = _padded(predict, math.ceil(batch_size / 8)) if bucketed else predict
        self._condition, self._sampler, self._shape, self._classes = condition, sampler, shape, classes
        self._draw, self._key = _draw, seed
        if compiled:
            # A number would be a constant of the graph, and every seed a graph of its own.
            self._draw, self._key = torch.compile(_draw), _sent(torch.tensor(_signed(seed)), ids.device)
        self._seed, self._ids, self._batch_size, self._start = seed, ids, batch_size, start
        schedule = sampler.schedule
        self._t_start = 0.0 if start is None else 1 - start.strength
        steps = int(_steps_until(self._t_start, schedule, torch.tensor([schedule.max_steps])))
        self._first = steps if schedule.decide_at is None else min(steps, schedule.decide_at)
        self._decided = 0 if schedule.decide_at is None else schedule.decide_at - self._first
        self._erasures: dict[tuple[int, int], list[Tensor]] = {}
        for erasure in erasures:
            self._erasures.setdefault((erasure.sample, erasure.after), []).append(erasure.positions)
        self._waiting = torch.arange(len(ids))
        self._slots: _Slots | None = None
        self._finished: list[tuple[Tensor, ...]] = []
        self.done = 0
        self._fill()

    def __iter__(self) -> "Refinement":
        return self

    @torch.no_grad()
    def __next__(self) -> Step:
        self._fill()
        if self._slots is None:
            raise StopIteration
        slots = self._erased(self._slots)
        step = _advance(self._predict, self._draw, self._sampler, self._key, self._t_start, slots)
        self._slots, done = slots, step.t_next == 1
        if done.any():
            leaving, staying = torch.nonzero(done).squeeze(1), torch.nonzero(~done).squeeze(1)
            left = (slots.rows, slots.taken, slots.tokens, slots.trace)
            self._finished.append(tuple(_rows(value, leaving) for value in left))
            self._slots = slots.select(staying) if len(staying) else None
            self.done += len(leaving)
        return step

    def erase(self, sample: int, positions: Tensor) -> Erasure:
        """Puts the tokens of one sample of the batch back to its noise, before its next step.

        Args:
            sample: its place in `ids`.
            positions: bool [T, H, W].

        Returns:
            what to give as one of `erasures` for the same samples again.

        Raises:
            UserError: the sample is not in the batch, or the positions are not of its map.
        """
        slots = self._slots
        if slots is None or sample not in slots.rows.tolist():
            raise UserError(f"sample {sample} is not being refined: it waits or is done")
        if positions.dtype != torch.bool or tuple(positions.shape) != self._shape[1:]:
            raise UserError(f"positions to erase must be bool {list(self._shape[1:])}, got {list(positions.shape)}")
        erasure = Erasure(sample, int(slots.taken[slots.rows == sample]), positions.cpu())
        self._erasures.setdefault((sample, erasure.after), []).append(erasure.positions)
        return erasure

    def fork(self) -> "Refinement":
        """Another refinement that goes on from here by itself, to the same samples unless it is changed."""
        other = copy.copy(self)
        other._erasures = {key: list(positions) for key, positions in self._erasures.items()}
        other._finished = list(self._finished)
        if self._slots is not None:  # what a step writes in its place
            written = {name: vars(self._slots)[name].clone() for name in ("step", "total", "trace")}
            other._slots = replace(self._slots, **written)
        return other

    @torch.no_grad()
    def maps(self) -> tuple[Tensor, Tensor]:
        """(rows int64 [n] on the CPU, the maps int64 [n, D, T, H, W] that their next step will see)."""
        if self._slots is None:
            return torch.empty(0, dtype=torch.long), torch.empty(0, *self._shape, dtype=torch.long)
        slots = self._erased(self._slots)
        return slots.rows, slots.tokens

    def take(self, most: int) -> tuple[Tensor, Refined]:
        """The first `most` of the samples that are done, which are then not kept here: (places in `ids`, ascending;
        the samples).

        Raises:
            UserError: none is done.
        """
        check(most >= 1, "most", "at least 1", most)
        if self.done == 0:
            raise UserError("no sample is done yet: take steps until `done` says so")
        whole = [torch.cat(parts) for parts in zip(*self._finished)]
        rows, steps, tokens, trace = (part[:most] for part in whole)
        self._finished = [tuple(part[most:] for part in whole)] if len(whole[0]) > most else []
        self.done -= len(rows)
        order = rows.argsort()
        steps, trace = steps[order], trace.cpu()[order]
        _check_finite(trace[torch.arange(trace.shape[1]) < steps[:, None]], self._sampler)
        refined = Refined(
            tokens=_rows(tokens, order),
            steps=steps,
            entropy=trace.gather(1, steps[:, None] - 1).squeeze(1),
            decision_entropy=trace[:, self._decided],
            trace=trace,
        )
        return rows[order], refined

    @torch.no_grad()
    def _fill(self) -> None:
        """Lets samples that wait enter the batch."""
        room = self._batch_size - (0 if self._slots is None else len(self._slots.rows))
        if room and len(self._waiting):
            entering, self._waiting = self._enter(self._waiting[:room]), self._waiting[room:]
            self._slots = entering if self._slots is None else self._slots.join(entering)

    def _enter(self, rows: Tensor) -> "_Slots":
        device, start = self._ids.device, self._start
        entering = self._ids[_sent(rows, device)]
        noise = philox.integers(self._seed, Stream.INITIAL_TOKENS, entering, 0, self._shape, self._classes)
        tokens, free = noise, torch.ones(len(rows), 1, 1, 1, 1, device=device)
        if start is not None:
            given = _rows(start.tokens, rows)
            known = philox.uniform(self._seed, Stream.INITIAL_KEEP, entering, 0, self._shape) < self._t_start
            tokens = torch.where(known, given, noise)
            if start.redraw is not None:
                redraw = _rows(start.redraw, rows)
                tokens, noise = torch.where(redraw, tokens, given), torch.where(redraw, noise, given)
                free = redraw.float()
        return _Slots(
            rows=rows,
            taken=torch.zeros_like(rows),
            step=torch.full_like(rows, self._first),
            total=torch.full_like(rows, self._sampler.schedule.max_steps),
            condition=self._condition.select(rows),
            ids=entering,
            noise=noise,
            free=free,
            tokens=tokens,
            trace=torch.full((len(rows), self._sampler.schedule.max_steps), math.nan, device=device),
        )

    def _erased(self, slots: "_Slots") -> "_Slots":
        """With what is to be erased before the next step; given tokens stay, as their noise is what is given."""
        if not self._erasures:
            return slots
        for place, key in enumerate(zip(slots.rows.tolist(), slots.taken.tolist())):
            for positions in self._erasures.get(key, ()):
                erased = torch.zeros(len(slots.rows), *positions.shape, dtype=torch.bool)
                erased[place] = positions
                tokens = torch.where(_sent(erased, slots.tokens.device)[:, None], slots.noise, slots.tokens)
                slots = replace(slots, tokens=tokens)
        return slots


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


def _advance(
    predict: Callable, draw: Callable, sampler: Sampler, seed: int | Tensor, t_start: float, slots: _Slots
) -> Step:
    """One step of every sample in the batch; nothing waits for the device, except where an entropy decides."""
    device, schedule = slots.ids.device, sampler.schedule
    t = schedule.signal_ratio(slots.step, slots.total).clamp(min=t_start)
    logits, conditional = _guided_logits(predict, slots.tokens, t, slots.condition, sampler)
    entropies = token_entropies(conditional)
    entropy = normalized_entropy(entropies, slots.free, conditional.shape[1]).float()
    if schedule.decide_at is not None and len(deciding := torch.nonzero(slots.step == schedule.decide_at).squeeze(1)):
        decisive = _rows(entropy, deciding).cpu()
        _check_finite(decisive, sampler)
        plan = schedule.plan(decisive)
        slots.total[deciding] = plan
        slots.step[deciding] = _steps_until(t_start, schedule, plan).clamp(min=schedule.decide_at)
    t_next = schedule.signal_ratio(slots.step + 1, slots.total)
    t_next = torch.where(t_next >= schedule.done_at, 1.0, t_next)

    taken = _sent(slots.taken, device)
    temperature = _sent((sampler.temperature * schedule.temperature_scale(slots.step, slots.total)).float(), device)
    shares = None
    if sampler.update == "psi":
        classes = torch.full_like(t, conditional.shape[1])
        kappa = kappa_at(t, t_next, sampler.kappa, sampler.kappa_form, sampler.kappa_window)
        told = (*reverse_shares(t, t_next, conditional.shape[1]), classes, kappa)
        shares = tuple(_sent(share.float(), device) for share in told)
    drawn = draw(
        seed, taken, logits, entropy, temperature, _sent(t_next.float(), device), shares,
        ids=slots.ids, tokens=slots.tokens, noise=slots.noise, free=slots.free,
    )  # fmt: skip
    predicted, kept, stayed, following, entropy = drawn
    step = Step(slots.taken, slots.rows, t, t_next, entropy, slots.tokens, predicted, kept, stayed, entropies)
    slots.trace.scatter_(1, taken[:, None], entropy[:, None])
    slots.tokens = following
    slots.taken, slots.step = slots.taken + 1, slots.step + 1
    return step


def _draw(
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


def _check_finite(entropy: Tensor, sampler: Sampler) -> None:
    """Of samples that were refined, on the CPU."""
    if not entropy.isfinite().all():
        raise UserError(
            f"the refiner's logits are not finite with {sampler}: its weights are damaged, or its training diverged; "
            "take an earlier checkpoint, or nearer values of sampler.guidance and sampler.temperature"
        )


def _steps_until(t: float, schedule: Schedule, total: Tensor) -> Tensor:
    """How many first steps of schedules of `total` int64 [B] steps do not lead beyond t (up to rounding): int64 [B]."""
    ratios = schedule.signal_ratio(torch.arange(1, schedule.max_steps + 1), total[:, None])
    return (ratios <= t + 1e-9).sum(dim=1)


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
    guided = torch.nonzero(sampler.guides(t)).squeeze(1)
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


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """A few numbers from the CPU to the device; a plain `to` would first wait until the device has done all before."""
    return values.to(device, non_blocking=True)


def _signed(seed: int) -> int:
    """The int64 of the same 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    """Some rows, by int64 on the CPU, of what is there or on a device."""
    return values[_sent(rows, values.device)]


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
