"""The run folder: what is written beside curves, checkpoints and pictures, and where a run goes on."""

import json
import platform
import shlex
import sys
from collections.abc import Iterable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from grn.checkpoints.native import Checkpoint, is_checkpoint, read_checkpoint
from grn.errors import UserError
from grn.files import write_json, write_text

PACKAGES = ("grn", "torch", "lightning", "hydra-core", "webdataset", "torch-fidelity", "wandb", "numpy")

# What the order of training is a function of, beside the shards and the seed.
DATA_ORDER = ("batch_size", "rank_streams", "worker_streams", "shuffle_buffer", "lookahead")


def record(folder: Path, config: DictConfig) -> None:
    """Writes `config.yaml` (resolved) and `versions.json`, and adds this start to `command.txt`."""
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    versions |= {name: version(name) for name in PACKAGES}
    write_json(folder / "versions.json", versions)
    earlier = folder / "command.txt"
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else sys.argv[1:]  # of this point of a sweep
    command = shlex.join(["python", "-m", "grn.train", *given])
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    write_text(earlier, f"{earlier.read_text() if earlier.exists() else ''}{started}  {command}\n")


def checkpoint_to_resume(config: DictConfig) -> Checkpoint | None:
    """What `ckpt_path` means, without weights: None to start afresh.

    Raises:
        UserError: there is nothing to go on from; the folder holds a run that this one would overwrite; the checkpoint
            is of another model, or of a data stream that cannot go on here; or it has all of `trainer.max_steps`
            behind it, which only `auto` takes for a run that is done (`is_done`).
    """
    folder = Path(config.paths.run) / "checkpoints"
    wanted = config.ckpt_path
    if wanted is None:
        if any(folder.glob("*.ckpt")) and not config.overwrite:
            raise UserError(
                f"{config.paths.run} already holds a run: go on with it by ckpt_path=last, choose another name=..., "
                "or start afresh with overwrite=true"
            )
        return None
    path = Path(wanted) if wanted not in ("last", "best", "auto") else folder / f"{wanted}.ckpt"
    if wanted == "auto":
        path = folder / "last.ckpt"
        if not is_checkpoint(path):
            return None
    if not is_checkpoint(path):
        raise UserError(f"ckpt_path={wanted}: there is no {path}; leave ckpt_path out to start afresh")
    checkpoint = read_checkpoint(path, key="ckpt_path", weights=False)
    trained = checkpoint.config
    for key in _same_keys(config, trained):
        old, new = OmegaConf.select(trained, key), OmegaConf.select(config, key)
        if old != new:
            raise UserError(
                f"ckpt_path={wanted}: {path} was trained with {key}={old}, this run has {key}={new}; give the same "
                "value, or another name=... for a new run"
            )
    had, has = (OmegaConf.select(c, "training.gan_weight", default=0) > 0 for c in (trained, config))
    if had != has:
        raise UserError(
            f"ckpt_path={wanted}: {path} was trained {'with' if had else 'without'} a discriminator: keep "
            f"training.gan_weight{' above 0' if had else '=0'} (training.gan_start holds a GAN back)"
        )
    if is_done(config, checkpoint) and wanted != "auto":
        steps = f"trainer.max_steps={config.trainer.max_steps}"
        raise UserError(
            f"ckpt_path={wanted}: {path} is of step {checkpoint.step} already, and {steps} counts from the start: "
            "give more to go on"
        )
    return checkpoint


def is_done(config: DictConfig, checkpoint: Checkpoint) -> bool:
    """Whether a run has no step left to train."""
    steps = config.trainer.max_steps
    return steps is not None and 0 <= steps <= checkpoint.step


def recorded_metrics(folder: Path) -> dict[str, float]:
    """What an earlier start wrote into `metrics.json`; nothing where it did not come so far."""
    path = folder / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8"))["metrics"] if path.is_file() else {}


def _same_keys(config: DictConfig, trained: DictConfig) -> Iterable[str]:
    models = {*config.model, *trained.model} - {"weights"}
    yield from (f"model.{key}" for key in sorted(models))
    yield from ("text_encoder._target_", "training._target_", "training.labeling", "training.discriminator", "seed")
    parts = [f"data.parts.{part}" for part in config.data.get("parts", {})]
    yield from (f"{data}.{key}" for data in ("data", *parts) for key in DATA_ORDER)


def check_top_level(config: DictConfig, known: Iterable[str]) -> None:
    """Raises:
    UserError: a key was added (`+key=...`) that nothing reads.
    """
    for key in config:
        if key not in set(known):
            raise UserError(f"no config key {key!r} is read by this command; known here: {', '.join(sorted(known))}")
