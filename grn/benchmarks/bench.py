"""Runs one benchmark: what `python -m grn.bench` does."""

import logging
from pathlib import Path
from typing import Any

from hydra.utils import get_method
from omegaconf import DictConfig

from grn.benchmarks import machine
from grn.runtime.errors import UserError
from grn.runtime.files import write_json
from grn.sampling.generation import best_device

log = logging.getLogger(__name__)


def bench(config: DictConfig) -> dict[str, Any]:
    """Runs what `benchmark` names; writes `bench.json` into `out`, with the machine, and returns it."""
    if config.repeats < 1:
        raise UserError(f"repeats={config.repeats}: at least one")
    device = best_device(config.device)
    keys = {key: value for key, value in config.benchmark.items() if key not in ("_target_", "name")}
    benchmark = get_method(config.benchmark._target_)
    measured = benchmark(model=config.model, device=device, repeats=config.repeats, **keys)
    report = {
        "benchmark": config.benchmark.name,
        "machine": machine.describe(device),
        "repeats": config.repeats,
        **measured,
    }
    path = write_json(Path(config.out) / "bench.json", report)
    log.info("written: %s", path)
    return report
