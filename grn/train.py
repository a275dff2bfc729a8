"""python -m grn.train +experiment=digits_c2i: trains a tokenizer or a refiner (config: conf/train.yaml)."""

import logging
import signal
import sys
import warnings
from pathlib import Path

import torch
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import seed_everything
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig

from grn import runs
from grn.callbacks.preemption import requeue
from grn.cli import entry_point
from grn.compiling import compile_network
from grn.errors import UserError
from grn.files import write_json
from grn.modules import check_fits, module_from_config
from grn.sweeps import objective
from grn.training.activations import checkpoint_activations
from grn.training.checkpoint_io import CheckpointIO
from grn.training.fsdp import FSDP

log = logging.getLogger(__name__)

TERMINATED = 128 + signal.SIGTERM  # the exit status, as a shell has it

KEYS = [
    "model",
    "text_encoder",
    "tokenizer",
    "training",
    "data",
    "sampler",
    "scores",
    "cluster",
    "trainer",
    "callbacks",
    "logger",
    "name",
    "seed",
    "ckpt_path",
    "monitor",
    "overwrite",
    "paths",
]


@entry_point("train")
def main(config: DictConfig) -> float | None:
    config.paths.run = HydraConfig.get().runtime.output_dir  # a sweep's points have a folder each
    try:
        return objective(train(config), config.monitor)
    finally:
        if wandb.run is not None:  # the next point of a sweep is another run
            wandb.finish()


def train(config: DictConfig) -> dict[str, float]:
    """Trains as `config` says, in the run folder `paths.run`; returns what was measured last, when its steps are done.

    `metrics.json` has it, too. A run that was done before is left as it is: one line says so with `ckpt_path=auto`,
    which scripts and schedulers may call again; `last`, `best` and paths ask to go on, and are refused with that line.

    After a SIGTERM it saves instead (`SaveOnSigterm`), and exits with the status `TERMINATED`.
    """
    runs.check_top_level(config, KEYS)
    if not isinstance(config.cluster.compile, bool):
        raise UserError(f"cluster.compile must be true or false, got {config.cluster.compile!r}")
    earlier = runs.checkpoint_to_resume(config)
    if earlier is not None and runs.is_done(config, earlier):
        log.info("%s is done: it is at step %d of trainer.max_steps", config.paths.run, earlier.step)
        return runs.recorded_metrics(Path(config.paths.run))
    _quieten()
    seed_everything(config.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision(config.cluster.matmul_precision)

    if "_target_" not in config.data:
        raise UserError("data=checkpoint is for grn.evaluate: choose data=digits, data=imagenet, data=tokens, ...")
    datamodule = instantiate(config.data)
    callbacks = [instantiate(callback) for callback in config.callbacks.values()]
    loggers = [instantiate(logger) for logger in config.logger.values()]
    plugins = [CheckpointIO()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # Lightning's way would save within the signal's handler
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers, plugins=plugins)
    sharded = isinstance(trainer.strategy, FSDP)
    module = module_from_config(config, hollow=sharded)
    check_fits(module, datamodule)
    if sharded:
        trainer.strategy.check(module.network)
    checkpoint_activations(module.network, config.cluster.activation_checkpointing)
    if config.cluster.compile:
        compile_network(module.network, trainer.strategy.root_device, key="cluster.compile", by_blocks=sharded)

    rank_zero_only(runs.record)(Path(config.paths.run), config)
    for logger in loggers:
        logger.log_hyperparams(module.checkpoint_extras["config"])
    log.info("run folder: %s (%.2f M parameters)", config.paths.run, _millions(module.network))
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=earlier and earlier.path, weights_only=True)
    except SIGTERMException as stopped:
        if trainer.global_rank > 0:
            sys.exit(0)  # Lightning kills rank 0, which may still be closing its logs, where another fails
        received = signal.Signals(*stopped.args or [signal.SIGTERM])
        step = trainer.global_step
        log.warning("stopped by %s after step %d: ckpt_path=last goes on from there", received.name, step)
        requeue(received)
        sys.exit(TERMINATED)
    trainer.save_checkpoint(Path(config.paths.run) / "checkpoints" / "last.ckpt", weights_only=False)
    measured = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
    report = {"step": trainer.global_step, "metrics": measured}
    rank_zero_only(write_json)(Path(config.paths.run) / "metrics.json", report)
    return measured


def _millions(network: torch.nn.Module) -> float:
    return sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6


def _quieten() -> None:
    """Silences advice that does not apply: loaders are sized by `data.*`, the tokenizer is frozen on purpose."""
    for message in (
        "does not have many workers",
        "Checkpoint directory .* exists and is not empty",
        "module\\(s\\) in eval mode",
        "no pre-optimization state was saved",  # the state after the step is the one to go on from
        "isinstance\\(treespec, LeafSpec\\)",
        "The `srun` command is available",  # jobs are submitted by cluster=slurm_...
        "It is recommended to use `self.log",  # with sync_dist: every rank has the same scores
        "returned a view tensor",  # logits, in which nothing is written
        "Grad strides do not match bucket view strides",  # of 1x1 kernels, where either order is the same memory
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
