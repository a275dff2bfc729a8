"""The loop of sampling: an always full batch of samples being refined, step by step (docs/method.md#sampling).

Samples that are done leave the batch and others from a queue take their places. A `Refinement` can be paused and
changed between two steps; `finished` runs it to its end.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from grn.method import philox
from grn.method.philox import Stream
from grn.method.sampler import (
    Condition,
    Sampler,
    Slots,
    Step,
    advance,
    check_finite,
    draw,
    select_rows,
    send,
    steps_until,
)
from grn.runtime.errors import UserError, check

ConditionT = TypeVar("ConditionT", bound=Condition)


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
        redraw = None if self.redraw is None else select_rows(self.redraw, rows)
        return Start(select_rows(self.tokens, rows), self.strength, redraw)

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
class Refined:
    """tokens int64 [B, D, T, H, W] on the device; the rest on the CPU.

    steps int64 [B]: taken. entropy float32 [B]: normalized, of the last prediction. decision_entropy float32 [B]: of
    the step whose entropy decides in an entropy-guided schedule; of the first step in a fixed one. trace float32
    [B, max_steps]: the normalized entropy of every step, NaN beyond the last. Given tokens that are never drawn do not
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
        self._draw, self._key = draw, seed
        if compiled:
            # A number would be a constant of the graph, and every seed a graph of its own.
            self._draw, self._key = torch.compile(draw), send(torch.tensor(_signed(seed)), ids.device)
        self._seed, self._ids, self._batch_size, self._start = seed, ids, batch_size, start
        schedule = sampler.schedule
        self._t_start = 0.0 if start is None else 1 - start.strength
        steps = int(steps_until(self._t_start, schedule, torch.tensor([schedule.max_steps])))
        self._first = steps if schedule.decide_at is None else min(steps, schedule.decide_at)
        self._decided = 0 if schedule.decide_at is None else schedule.decide_at - self._first
        self._erasures: dict[tuple[int, int], list[Tensor]] = {}
        for erasure in erasures:
            self._erasures.setdefault((erasure.sample, erasure.after), []).append(erasure.positions)
        self._waiting = torch.arange(len(ids))
        self._slots: Slots | None = None
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
        step = advance(self._predict, self._draw, self._sampler, self._key, self._t_start, slots)
        self._slots, done = slots, step.t_next == 1
        if done.any():
            leaving, staying = torch.nonzero(done).squeeze(1), torch.nonzero(~done).squeeze(1)
            left = (slots.rows, slots.taken, slots.tokens, slots.trace)
            self._finished.append(tuple(select_rows(value, leaving) for value in left))
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
        check_finite(trace[torch.arange(trace.shape[1]) < steps[:, None]], self._sampler)
        refined = Refined(
            tokens=select_rows(tokens, order),
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

    def _enter(self, rows: Tensor) -> "Slots":
        device, start = self._ids.device, self._start
        entering = self._ids[send(rows, device)]
        noise = philox.integers(self._seed, Stream.INITIAL_TOKENS, entering, 0, self._shape, self._classes)
        tokens, free = noise, torch.ones(len(rows), 1, 1, 1, 1, device=device)
        if start is not None:
            given = select_rows(start.tokens, rows)
            known = philox.uniform(self._seed, Stream.INITIAL_KEEP, entering, 0, self._shape) < self._t_start
            tokens = torch.where(known, given, noise)
            if start.redraw is not None:
                redraw = select_rows(start.redraw, rows)
                tokens, noise = torch.where(redraw, tokens, given), torch.where(redraw, noise, given)
                free = redraw.float()
        return Slots(
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

    def _erased(self, slots: "Slots") -> "Slots":
        """With what is to be erased before the next step; given tokens stay, as their noise is what is given."""
        if not self._erasures:
            return slots
        for place, key in enumerate(zip(slots.rows.tolist(), slots.taken.tolist())):
            for positions in self._erasures.get(key, ()):
                erased = torch.zeros(len(slots.rows), *positions.shape, dtype=torch.bool)
                erased[place] = positions
                tokens = torch.where(send(erased, slots.tokens.device)[:, None], slots.noise, slots.tokens)
                slots = replace(slots, tokens=tokens)
        return slots


def _signed(seed: int) -> int:
    """The int64 of the same 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


def _padded(predict: Callable, multiple: int) -> Callable:
    """`predict` of a multiple of so many rows, the last one again and again; their logits are dropped."""

    def padded(tokens: Tensor, t: Tensor, condition: Condition) -> Tensor:
        count = len(tokens)
        if count % multiple == 0:
            return predict(tokens, t, condition)
        rows = torch.arange(count + -count % multiple).clamp(max=count - 1)
        return predict(select_rows(tokens, rows), select_rows(t, rows), condition.select(rows))[:count]

    return padded
