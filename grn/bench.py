"""python -m grn.bench what=tokenizer: speed and memory on this machine, into bench.json (conf/bench.yaml)."""

import logging
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method
from omegaconf import DictConfig

from grn.benchmarks import machine
from grn.cli import entry_point
from grn.errors import UserError
from grn.files import write_json
from grn.generation import best_device

log = logging.getLogger(__name__)


@entry_point("bench")
def main(config: DictConfig) -> None:
    config.out = HydraConfig.get().runtime.output_dir  # a sweep's points have a folder each
    bench(config)


def bench(config: DictConfig) -> dict[str, Any]:
    """Runs what `what` names; writes `bench.json` into `out`, with the machine, and returns it."""
    if config.repeats < 1:
        raise UserError(f"repeats={config.repeats}: at least one")
    device = best_device(config.device)
    keys = {key: value for key, value in config.what.items() if key not in ("_target_", "name")}
    benchmark = get_method(config.what._target_)
    measured = benchmark(model=config.model, device=device, repeats=config.repeats, **keys)
    report = {"what": config.what.name, "machine": machine.describe(device), "repeats": config.repeats, **measured}
    path = write_json(Path(config.out) / "bench.json", report)
    log.info("written: %s", path)
    return report


if __name__ == "__main__":
    main()
