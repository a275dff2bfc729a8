"""Fitting entropy-guided sampling to a mean number of steps: what `python -m grn.calibrate` does."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from grn.checkpoints.sampler_config import build_sampler, write_sampler
from grn.method.schedules import EntropyGuided
from grn.runtime.errors import UserError, check_count
from grn.runtime.files import write_json
from grn.runtime.ranks import gather, join, rank_and_world_size, together
from grn.runtime.tables import show
from grn.sampling.calibration import TOLERANCE, decision_entropies, fit, steps_taken, wanted_spread
from grn.sampling.generation import best_device, check_memory
from grn.sampling.loading import load_refiner
from grn.sampling.request import Request

log = logging.getLogger(__name__)

ENOUGH = 500  # samples to fit to


def calibrate(config: DictConfig) -> dict[str, Any]:
    """Measures, fits, checks, and writes `sampler.yaml` and `calibration.json` into `out`; returns the latter.

    Raises:
        UserError: what is asked for cannot be had, or misses the target on the samples that were not fitted to.
    """
    check_count("batch_size", config.batch_size)
    if config.num is not None:
        check_count("num", config.num)
    bundle, source = load_refiner(config.ckpt, ema=config.ema)
    if config.sampler.schedule.get("_target_") != "grn.method.schedules.EntropyGuided":
        raise UserError("sampler: only an entropy-guided schedule is calibrated; leave sampler=... out")
    sampler = build_sampler(config.sampler, bundle.sampler)
    schedule = sampler.schedule
    assert isinstance(schedule, EntropyGuided)
    target = _number("target_steps", config.target_steps)
    spread = wanted_spread(schedule, target, None if config.spread is None else _number("spread", config.spread))
    num = _number_of_samples(config.num, bundle.num_conditions)
    device = join(best_device(config.device))
    rank, world_size = rank_and_world_size()
    ids = torch.arange(rank, num, world_size)
    check_memory(bundle, bundle.complete(Request(num=num, sampler=sampler)), batch_size=config.batch_size)
    bundle = bundle.to(device)

    with (
        Progress(transient=True, disable=rank > 0) as progress,
        torch.autocast(device.type, torch.bfloat16, enabled=config.bf16),
        together(),
    ):
        task = progress.add_task("measuring entropies", total=len(ids))
        entropy = decision_entropies(
            bundle,
            Request(num=num, seed=config.seed, sampler=sampler),
            batch_size=config.batch_size,
            ids=ids,
            advance=lambda number: progress.advance(task, number),
        )
    own, entropy = entropy, torch.empty(num)
    for first, part in enumerate(gather(own)):
        entropy[first::world_size] = part
    halves = dict(zip(("fitted", "fresh"), entropy.chunk(2)))
    schedule = fit(schedule, halves["fitted"], target=target, spread=spread)
    sampler = replace(sampler, schedule=schedule)
    measured = {name: _described(schedule, half) for name, half in halves.items()}
    if rank == 0:
        _print(measured, target)
    mean = measured["fresh"]["steps_mean"]
    if abs(mean / target - 1) > TOLERANCE:
        raise UserError(
            f"num={num}: {mean:.2f} steps on average over held-out samples, more than "
            f"{TOLERANCE:.0%} off target_steps={target}; give a larger num"
        )
    out = Path(config.out)
    report = {**source, "target_steps": target, "spread": spread, "sampler": repr(sampler), "seed": config.seed}
    report |= measured
    fresh = measured["fresh"]
    remark = (
        f"Fitted by python -m grn.calibrate to {source['ckpt']}, step {source['step']}; on {fresh['samples']} fresh "
        f"samples\n{fresh['steps_mean']} steps in the mean, {fresh['steps_min']} to {fresh['steps_max']}."
    )
    if rank > 0:
        return report
    write_json(out / "calibration.json", report)
    path = write_sampler(out / "sampler.yaml", sampler, remark)
    log.info("written: %s (sampler=calibrated; of another folder, with sampler.file=...)", path)
    return report


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{key}={value}: give a number of steps")
    return value


def _number_of_samples(num: int | None, num_labels: int) -> int:
    """Of which each half has every class equally often."""
    if num is None:
        num = 2 * num_labels * math.ceil(ENOUGH / num_labels)
    if num % (2 * num_labels):
        raise UserError(f"num={num} is not a multiple of {2 * num_labels}: {num_labels} classes, twice")
    return num


def _described(schedule: EntropyGuided, entropy: Tensor) -> dict[str, int | float]:
    steps = steps_taken(schedule, entropy).double()
    return {
        "samples": len(steps),
        "steps_mean": round(steps.mean().item(), 3),
        "steps_std": round(steps.std(correction=0).item(), 3),
        "steps_min": int(steps.min()),
        "steps_max": int(steps.max()),
        "entropy_mean": round(entropy.mean().item(), 5),
        "entropy_min": round(entropy.min().item(), 5),
        "entropy_max": round(entropy.max().item(), 5),
    }


def _print(measured: dict[str, dict[str, int | float]], target: float) -> None:
    table = Table(title=f"steps by the entropies of samples; target {target} in the mean")
    for column in ("samples", "number", "mean", "std", "min", "max", "entropy"):
        table.add_column(column, justify="left" if column == "samples" else "right", no_wrap=True)
    for name, row in measured.items():
        steps = (f"{row['steps_mean']:.2f}", f"{row['steps_std']:.2f}", str(row["steps_min"]), str(row["steps_max"]))
        entropy = f"{row['entropy_mean']:.4f} ({row['entropy_min']:.4f}-{row['entropy_max']:.4f})"
        table.add_row(name, str(row["samples"]), *steps, entropy)
    show(table)
