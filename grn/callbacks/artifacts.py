"""Logs code and config to W&B."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from grn.runtime.config_folder import CONF

PACKAGE = Path(__file__).resolve().parents[1]


class CodeAndConfig(Callback):
    """Gives W&B this package's code and config groups, and the run's config, as artifacts; other loggers nothing.

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

                code = wandb.Artifact("grn-code", type="code")
                for folder, pattern in ((PACKAGE, "*.py"), (CONF, "*.yaml")):
                    for path in sorted(folder.rglob(pattern)):
                        code.add_file(str(path), name=f"{folder.name}/{path.relative_to(folder)}")
                logger.experiment.log_artifact(code)
                config = wandb.Artifact(f"config-{logger.experiment.id}", type="config")
                config.add_file(str(self.config))
                logger.experiment.log_artifact(config)
