"""Calibration of entropy-guided sampling: fits its constants to a mean number of steps
(docs/method.md#entropy-guided-sampling).

The first `warmup` steps do not depend on `scale` and `offset`, nor does the entropy that decides: it is measured once,
by those steps alone, and then every pair of constants says how many steps each of these samples would take.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from grn.method.schedules import EntropyGuided
from grn.runtime.errors import UserError
from grn.sampling.bundle import RefinerBundle
from grn.sampling.request import AnyRequest

TOLERANCE = 0.05  # of the mean number of steps, on samples that were not fitted to


def decision_entropies(
    bundle: RefinerBundle,
    request: AnyRequest,
    *,
    batch_size: int,
    ids: Tensor | None = None,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """The entropies float32 [N] (CPU) by which the entropy-guided sampler of a request decides on its samples.

    Args:
        ids: int64 [N], which of the samples; None: all.
        advance: gets the number of each few that are measured.

    Raises:
        UserError: another schedule.
    """
    complete = bundle.complete(request)
    schedule = complete.sampler.schedule
    if not isinstance(schedule, EntropyGuided):
        raise UserError("sampler: only an entropy-guided schedule is calibrated; leave sampler=... out")
    schedule = replace(schedule, scale=0.0, offset=0.0, min_steps=schedule.warmup + 1)
    short = replace(complete, sampler=replace(complete.sampler, schedule=schedule))
    entropy = torch.empty(complete.num if ids is None else len(ids))
    for rows, refined in bundle.generate_queue(short, ids=ids, batch_size=batch_size):
        entropy[rows] = refined.decision_entropy
        if advance is not None:
            advance(len(rows))
    return entropy


def steps_taken(schedule: EntropyGuided, entropy: Tensor) -> Tensor:
    """How many steps int64 [B] samples of these entropies [B] take: as planned, less those beyond `done_at`."""
    total = schedule.plan(entropy)
    ratios = schedule.signal_ratio(torch.arange(1, schedule.max_steps + 1), total[:, None])
    return (ratios < schedule.done_at).sum(dim=1) + 1


def wanted_spread(schedule: EntropyGuided, target: float, spread: float | None) -> float:
    """`spread`, or half of the largest standard deviation that steps within the schedule's limits can have.

    That is the one of samples that all take `min_steps` or `max_steps`, `target` in the mean.

    Raises:
        UserError: the limits do not allow that mean, or that spread.
    """
    low, high = schedule.min_steps, schedule.max_steps
    if not low < target < high:
        raise UserError(f"target_steps={target} must be between tmin={low} and tmax={high}: choose other limits")
    largest = math.sqrt((target - low) * (high - target))
    if spread is None:
        return largest / 2
    if not 0 < spread < largest:
        raise UserError(
            f"spread={spread} must be above 0 and below {largest:.3g}, the most that tmin={low} and tmax={high} allow "
            f"at target_steps={target}; sampler=linear gives all samples the same steps"
        )
    return spread


def fit(schedule: EntropyGuided, entropy: Tensor, *, target: float, spread: float | None = None) -> EntropyGuided:
    """The schedule with `scale` and `offset` such that samples of these entropies take `target` steps in the mean.

    Between the limits a sample's steps grow evenly with its entropy. With the mean held, a steeper slope spreads the
    steps wider, and with the slope held, the mean grows with the offset: two bisections, one within the other.

    Args:
        entropy: float [N], of samples at the step that decides.
        target: steps, between the schedule's limits.
        spread: standard deviation of the steps; None as in `wanted_spread`.

    Raises:
        UserError: the limits do not allow it, or the entropies differ too little to tell samples apart.
    """
    spread = wanted_spread(schedule, target, spread)
    entropy = entropy.double()
    mean, std = entropy.mean().item(), entropy.std(correction=0).item()
    if not std > 1e-6:  # float32 of one value, or NaN
        raise UserError(
            f"the entropies of all {len(entropy)} samples are the same at step wp={schedule.warmup} ({mean:.6f}): they "
            "tell no sample from another; train longer, or choose another wp"
        )

    def with_slope(slope: float) -> EntropyGuided:
        """`slope` in steps a standard deviation of the entropy."""
        reach = slope * ((entropy - mean).abs().max().item() / std) + 1
        low, high = schedule.min_steps - reach, schedule.max_steps + reach  # the steps at the mean entropy
        for _ in range(50):
            middle = (low + high) / 2
            found = replace(schedule, scale=slope / std, offset=middle - schedule.warmup - slope / std * mean)
            few = steps_taken(found, entropy).double().mean() < target
            low, high = (middle, high) if few else (low, middle)
        return found

    low, high = 0.0, 100.0 * (schedule.max_steps - schedule.min_steps)
    for _ in range(30):
        slope = (low + high) / 2
        found = with_slope(slope)
        narrow = steps_taken(found, entropy).double().std(correction=0) < spread
        low, high = (slope, high) if narrow else (low, slope)
    steps = steps_taken(found, entropy).double()
    if abs(steps.mean().item() - target) > TOLERANCE / 2 * target or steps.std(correction=0) < 0.8 * spread:
        raise UserError(
            f"target_steps={target} with spread={spread:.3g} is unreachable: the entropies of {len(entropy)} samples "
            f"take too few values at step wp={schedule.warmup}; choose another wp or spread"
        )
    return found
