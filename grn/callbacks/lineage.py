"""Tells W&B what a run is made of: code and config, and the data set and the tokenizer that it uses."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from grn.runtime.config_folder import CONF
from grn.runtime.trainer import Trainer

PACKAGE = Path(__file__).resolve().parents[1]
RECORD = ("path", "step", "sha256")  # of a frozen tokenizer, what tells it apart


class Lineage(Callback):
    """Artifacts of a W&B run, for its lineage graph; other loggers get none.

    Logged: this package's code and config groups, and the run's config. Used, online only, as W&B has it: what the
    data set's manifest and the frozen tokenizer say of themselves; runs of the same ones share these.

    Args:
        config: the run's `config.yaml`.
    """

    def __init__(self, config: str):
        self.config = Path(config)

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb  # takes its time, and has it taken already where there is such a logger

                run = logger.experiment
                code = wandb.Artifact("grn-code", type="code")
                for folder, pattern in ((PACKAGE, "*.py"), (CONF, "*.yaml")):
                    for path in sorted(folder.rglob(pattern)):
                        code.add_file(str(path), name=f"{folder.name}/{path.relative_to(folder)}")
                run.log_artifact(code)
                config = wandb.Artifact(f"config-{run.id}", type="config")
                config.add_file(str(self.config))
                run.log_artifact(config)
                if run.settings.mode == "online":
                    for name, kind, about in _inputs(trainer, pl_module):
                        used = wandb.Artifact(name, type=kind)
                        with used.new_file(f"{kind}.json") as file:
                            json.dump(about, file, indent=1)
                        run.use_artifact(used)


def _inputs(trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(Name, type, description) of what a run uses; an own data module or network may tell nothing of itself."""
    data, parts = trainer.datamodule, getattr(trainer.datamodule, "parts", None)
    for part in parts.values() if isinstance(parts, Mapping) else [data]:
        if manifest := getattr(part, "manifest", None):
            about = {key: value for key, value in manifest.items() if key != "splits"}
            about["samples"] = {split: found["samples"] for split, found in manifest["splits"].items()}
            about["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
            yield f"data-{re.sub(r'[^A-Za-z0-9._-]', '_', str(manifest['name']))[:100]}", "dataset", about
    if record := getattr(pl_module, "checkpoint_extras", {}).get("tokenizer"):
        yield f"tokenizer-{record['sha256'][:12]}", "model", {name: record[name] for name in RECORD}
