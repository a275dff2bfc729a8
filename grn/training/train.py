"""Training a tokenizer or a refiner as a config says: what `python -m grn.train` does."""

import logging
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
from hydra.utils import instantiate
from lightning import seed_everything
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from omegaconf import DictConfig

from grn.runs import folder as runs
from grn.runs.wandb_runs import finish
from grn.runtime.config_folder import top_level_keys
from grn.runtime.errors import UserError, check, check_count
from grn.runtime.files import write_json
from grn.runtime.interruption import STOPPING, Interrupted
from grn.training.activations import checkpoint_activations
from grn.training.building import check_fits, module_from_config, tell_packing
from grn.training.checkpoint_io import CheckpointIO
from grn.training.compiling import check_mode, compile_network
from grn.training.environment import check_started, cluster_environment
from grn.training.fsdp import FSDP
from grn.training.requeue import requeue

log = logging.getLogger(__name__)


def train(config: DictConfig) -> dict[str, float]:
    """Trains as `config` says, in the run folder `paths.run`; returns what was measured last, when its steps are done.

    `metrics.json` has it, too. A run that was done before is left as it is: one line says so with `ckpt_path=auto`,
    which scripts and schedulers may call again; `last`, `best` and paths ask to go on, and are refused with that line.

    After a SIGTERM, Ctrl-C or SIGHUP it saves instead (`SaveOnSigterm`), and exits with the status that a shell has for
    the signal.
    """
    try:
        return _train(config)
    except SystemExit as exit:
        if isinstance(exit.__context__, Interrupted):  # outside of the steps: Lightning ends the other ranks and exits
            raise exit.__context__ from None
        raise
    except (MisconfigurationException, ValueError) as error:  # what Lightning finds wrong with the config
        if isinstance(error, ValueError) and not _is_raised_by_lightning(error):
            raise
        raise UserError(" ".join(str(error).split())) from error
    finally:
        finish()  # the next point of a sweep is another run


def _train(config: DictConfig) -> dict[str, float]:
    runs.check_top_level(config, top_level_keys("train"))
    for key in ("devices", "num_nodes"):
        if config.trainer[key] != config.cluster[key]:
            raise UserError(f"trainer.{key}={config.trainer[key]}: give cluster.{key}={config.trainer[key]} instead")
    if not str(config.get("name") or "").strip():
        raise UserError("name is empty: it is that of the run's folder, name=...")
    if config.trainer.get("val_check_interval") == 0:
        raise UserError("trainer.val_check_interval=0 must be a number of steps above 0, or null")
    for key in ("log_every_n_steps", "accumulate_grad_batches"):
        check_count(f"trainer.{key}", config.trainer[key])
    if config.trainer.max_steps != -1:
        check(
            type(config.trainer.max_steps) is int and config.trainer.max_steps > 0,
            "trainer.max_steps",
            "a whole number of at least 1, or -1 for no end",
            config.trainer.max_steps,
        )
    accelerators = ["auto", "gpu", *sorted(AcceleratorRegistry.available_accelerators())]
    for key, known in (("accelerator", accelerators), ("strategy", ["auto", *StrategyRegistry.available_strategies()])):
        value = config.trainer.get(key)
        if isinstance(value, str) and value.lower() not in known:
            place = "cluster" if value == config.cluster[key] else "trainer"
            main = ", ".join(name for name in known if "_" not in name)
            raise UserError(f"{place}.{key}={value} must be one that Lightning has, such as {main}")
    if config.training.get("adapters") is not None and config.model.get("weights") is None:
        raise UserError("training.adapters go on top of weights that stay as they are: give model.weights")
    if config.trainer.get("fast_dev_run"):
        return _try_out(config)
    return _run(config)


def _try_out(config: DictConfig) -> dict[str, float]:
    """Lightning's `fast_dev_run`: a few batches of everything, of which nothing is kept."""
    if config.ckpt_path is not None:
        raise UserError(f"trainer.fast_dev_run starts over: leave ckpt_path={config.ckpt_path} out")
    with tempfile.TemporaryDirectory() as folder:
        config.paths.run = folder
        return _run(config)


def _run(config: DictConfig) -> dict[str, float]:
    if not isinstance(config.cluster.compile, bool):
        raise UserError(f"cluster.compile must be true or false, got {config.cluster.compile!r}")
    mode = config.cluster.get("compile_mode", "default")
    mode = check_mode(mode, config.cluster.compile, key="cluster.compile", trains=True)
    if type(config.seed) is not int or not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed} must be a whole number, 0 to {2**32 - 1}")
    earlier = runs.checkpoint_to_resume(config)
    if earlier is not None and runs.is_done(config, earlier):
        log.info("%s is done: it is at step %d of trainer.max_steps", config.paths.run, earlier.step)
        return runs.recorded_metrics(Path(config.paths.run))
    _quieten()
    seed_everything(config.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision(config.cluster.matmul_precision)

    if config.cluster.accelerator in ("gpu", "cuda") and not torch.accelerator.is_available():
        raise UserError(
            f"cluster.accelerator={config.cluster.accelerator}: there is no GPU here; cluster=auto takes what there "
            "is, cluster=cpu the CPU"
        )
    if "_target_" not in config.data:
        raise UserError("data=checkpoint is for grn.evaluate: choose data=digits, data=imagenet, data=tokens, ...")
    datamodule = instantiate(config.data)
    callbacks = [instantiate(callback) for callback in config.callbacks.values() if callback]  # callbacks.x=null: not x
    loggers = [instantiate(logger) for logger in config.logger.values()]
    plugins = [CheckpointIO(), *cluster_environment(config.cluster.devices, config.cluster.num_nodes)]
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers, plugins=plugins)
    check_started(trainer.num_devices, trainer.num_nodes)
    sharded = isinstance(trainer.strategy, FSDP)
    module = module_from_config(config, hollow=sharded)
    check_fits(module, datamodule)
    tell_packing(module, datamodule)
    if earlier is not None:
        runs.check_tokenizer(earlier, module.checkpoint_extras)
    if sharded:
        trainer.strategy.check(module.network)
    checkpoint_activations(module.network, config.cluster.activation_checkpointing)
    if config.cluster.compile:
        device = trainer.strategy.root_device
        compile_network(module.network, device, key="cluster.compile", mode=mode, by_blocks=sharded)

    rank_zero_only(runs.check_disk)(Path(config.paths.run), runs.checkpoint_bytes(config, module))
    rank_zero_only(runs.record)(Path(config.paths.run), config)
    for logger in trainer.loggers:
        logger.log_hyperparams(module.checkpoint_extras["config"])
    log.info("run folder: %s (%.2f M parameters)", config.paths.run, _millions(module.network))
    log.info("learning rate: %.6g%s", module.learning_rate, _of_batch(config))
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=earlier and earlier.path, weights_only=True)
    except SIGTERMException as stopped:
        if trainer.global_rank > 0:
            sys.exit(0)  # Lightning kills rank 0, which may still be closing its logs, where another fails
        received = signal.Signals(stopped.args[0] if stopped.args else signal.SIGTERM)
        step = trainer.global_step
        log.warning("stopped by %s after step %d: ckpt_path=last resumes from there", received.name, step)
        requeue(received)
        sys.exit(128 + (received if received in STOPPING else signal.SIGTERM))
    if not trainer.fast_dev_run:
        trainer.save_checkpoint(Path(config.paths.run) / "checkpoints" / "last.ckpt", weights_only=False)
    measured = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
    report = {"step": trainer.global_step, "metrics": measured}
    rank_zero_only(write_json)(Path(config.paths.run) / "metrics.json", report)
    return measured


def _of_batch(config: DictConfig) -> str:
    """What a learning rate goes with: samples (of packs: packs) in an optimizer step."""
    batch, accumulated = config.data.get("batch_size"), config.trainer.accumulate_grad_batches
    if batch is None:  # of a mixture, parts may differ
        return ""
    told = f"data.batch_size={batch}" + (f", {accumulated} of them accumulated" if accumulated > 1 else "")
    return f" at a global batch of {batch * accumulated} ({told})"


def _is_raised_by_lightning(error: BaseException) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("lightning.")


def _millions(network: torch.nn.Module) -> float:
    return sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6


def _quieten() -> None:
    """Silences advice that does not apply: loaders are sized by `data.*`, the tokenizer is frozen on purpose."""
    for message in (
        "does not have many workers",
        "Checkpoint directory .* exists and is not empty",
        "module\\(s\\) in eval mode",
        "callbacks used to create the checkpoint need to be provided",  # where one now saves at other times: it does
        "no pre-optimization state was saved",  # the state after the step is the one to go on from
        "isinstance\\(treespec, LeafSpec\\)",
        "The `srun` command is available",  # jobs are submitted by cluster=slurm_...
        "It is recommended to use `self.log",  # with sync_dist: every rank has the same scores
        "returned a view tensor",  # logits, in which nothing is written
        "You requested to overfit but enabled",  # the data repeat their batches (grn.data.stream.endless)
        "Grad strides do not match bucket view strides",  # of 1x1 kernels, where either order is the same memory
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
