"""The run folder: what is recorded in it, and which checkpoint to resume from."""

import inspect
import logging
import platform
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from grn.checkpoints.native import Checkpoint, read_checkpoint
from grn.checkpoints.sharded import verify
from grn.runs.listing import read_metrics
from grn.runs.resuming import check_resumable
from grn.runtime.errors import UserError
from grn.runtime.files import write_json, write_text
from grn.runtime.git import commit_of, package_commit
from grn.runtime.ranks import place
from grn.runtime.secrets import cut, without_secrets

log = logging.getLogger(__name__)

KEPT = 4  # checkpoints at most at a time: last, the one before it, best, and one that is being written
PACKAGES = ("grn", "torch", "lightning", "hydra-core", "webdataset", "torch-fidelity", "wandb", "numpy")

# What the order of training is a function of, beside the shards.
DATA_ORDER = ("seed", "batch_size", "rank_streams", "worker_streams", "shuffle_buffer", "lookahead")


def record(folder: Path, config: DictConfig) -> None:
    """Writes `config.yaml` (resolved) and `versions.json`, and adds this start to `command.txt`."""
    plain = without_secrets(OmegaConf.to_container(config, resolve=True))
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    versions |= {name: version(name) for name in PACKAGES}
    # Of this code, and of the experiment's where that is another checkout; `+`: with changes.
    versions |= {"git": package_commit(), "git_here": commit_of(Path.cwd())}
    write_json(folder / "versions.json", versions)
    earlier = folder / "command.txt"
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else sys.argv[1:]  # of this point of a sweep
    command = shlex.join(["python", "-m", "grn.train", *map(cut, given)])
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    before = earlier.read_text(encoding="utf-8", errors="replace") if earlier.exists() else ""
    write_text(earlier, f"{before}{started}  {command}\n")


def checkpoint_to_resume(config: DictConfig) -> Checkpoint | None:
    """What `ckpt_path` means, without weights: None to start over.

    Raises:
        UserError: there is nothing to go on from, or it is damaged; the folder holds a run that this one would
            overwrite; the checkpoint is of another model, or of a data stream that cannot go on here; or it has all of
            `trainer.max_steps` behind it, which only `auto` takes for a run that is done (`is_done`).
    """
    path, wanted = check_resumable(config), config.ckpt_path
    if path is None:
        return None
    rank, _, ranks = place()
    verify(path, key="ckpt_path", share=(rank, ranks))
    checkpoint = read_checkpoint(path, key="ckpt_path", weights=False)
    trained = checkpoint.config
    for key in _same_keys(config, trained):
        old, new = _value(trained, key), _value(config, key)
        if old != new:
            raise UserError(
                f"ckpt_path={wanted}: {path} was trained with {key}={old}, this run has {key}={new}; give the same "
                "value, or another name=... for a new run"
            )
    if "lr_schedulers" not in checkpoint.contents:
        raise UserError(
            f"ckpt_path={wanted}: {path} has no optimizer state (callbacks.milestones.save_weights_only=true): no run "
            "can resume from it; give another one"
        )
    frozen = "path" in config.get("text_encoder", {})  # whose weights stand in no checkpoint
    for key in ("model.weights", *(() if frozen else ("text_encoder.weights",))):
        weights = OmegaConf.select(config, key)
        if weights and weights != OmegaConf.select(trained, key):
            raise UserError(
                f"{key}={weights} has no effect with ckpt_path={wanted}, which resumes from the weights of {path}: "
                "leave one of them out"
            )
    kept, decays = (OmegaConf.select(c, "callbacks.ema.decays") or [] for c in (trained, config))
    if odd := [decay for decay in decays if decay not in kept]:
        raise UserError(
            f"callbacks.ema.decays={list(decays)}: {path} holds no average of {odd[0]}, only of "
            f"{', '.join(map(str, kept)) or 'none'}: use those it was trained with, or some of them"
        )
    had, has = (sorted(c.data.get("parts", {})) for c in (trained, config))
    if had != has:
        raise UserError(
            f"ckpt_path={wanted}: {path} was trained on data.parts={had}, this run has data.parts={has}: give the same"
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
            "raise it to continue"
        )
    return checkpoint


def check_tokenizer(checkpoint: Checkpoint, extras: Mapping[str, Any]) -> None:
    """Raises:
    UserError: the run would go on with another tokenizer, to whose tokens the refiner was not trained.

    Args:
        extras: the module's `checkpoint_extras`.
    """
    had, has = (found.get("tokenizer") for found in (checkpoint.contents, extras))
    if had and has and had["sha256"] != has["sha256"]:
        raise UserError(
            f"tokenizer.ckpt={has['path']} is not the tokenizer of {checkpoint.path} ({had['path']}), which knows no "
            "tokens but that one's: give the same, or begin a new run"
        )


def is_done(config: DictConfig, checkpoint: Checkpoint) -> bool:
    """Whether a run has no step left to train."""
    steps = config.trainer.max_steps
    return steps is not None and 0 <= steps <= checkpoint.step


def recorded_metrics(folder: Path) -> dict[str, float]:
    """What an earlier start wrote into `metrics.json`; nothing where it did not come so far.

    Raises:
        UserError: it is damaged.
    """
    try:
        return read_metrics(folder / "metrics.json")[1]
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{error}: remove it; grn.evaluate measures it again") from None


def _same_keys(config: DictConfig, trained: DictConfig) -> Iterable[str]:
    models = {*config.model, *trained.model} - {"weights"}
    yield from (f"model.{key}" for key in sorted(models))
    yield from (f"text_encoder.{key}" for key in ("_target_", "width", "depth", "heads", "hidden"))
    yield from ("training._target_", "training.labeling", "training.discriminator", "seed")
    parts = [f"data.parts.{part}" for part in config.data.get("parts", {})]
    yield from (f"{data}.{key}" for data in ("data", *parts) for key in DATA_ORDER)


def _value(config: DictConfig, key: str) -> Any:
    """Of a config that may be from before there was such a key: then a network has its default."""
    group, _, name = key.partition(".")
    if group == "model" and name not in config.model:
        parameters = inspect.signature(get_class(config.model._target_)).parameters
        return parameters[name].default if name in parameters else None
    return OmegaConf.select(config, key)


def check_top_level(config: DictConfig, known: Iterable[str]) -> None:
    """Raises:
    UserError: a key was added (`+key=...`) that nothing reads.
    """
    for key in config:
        if key not in set(known):
            raise UserError(f"no config key {key!r} is read by this command; known here: {', '.join(sorted(known))}")


def checkpoint_bytes(config: DictConfig, module: Any) -> int:
    """About what a checkpoint takes: weights, averages, AdamW's two states, all in float32, the tokenizer's record."""
    weights = sum(p.numel() * p.element_size() for p in module.network.parameters())
    trained = sum(p.numel() for p in module.network.parameters() if p.requires_grad)
    averages = len(config.callbacks.ema.decays) if config.callbacks.get("ema") else 0
    record = module.checkpoint_extras.get("tokenizer") or {}
    tensors = (value for value in (record.get("state_dict") or {}).values())
    return weights + 4 * trained * (2 + averages) + sum(tensor.nbytes for tensor in tensors)


def check_disk(folder: Path, needed: int) -> None:
    """Raises:
    UserError: the run folder's disk has no room for a single checkpoint; a warning: none for all that are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    told = f"a checkpoint of this run takes about {needed / 1e9:.2f} GB, and the disk of {folder} has {free / 1e9:.2f}"
    if free < needed:
        raise UserError(f"{told}: free space, or give another paths.runs=...")
    held = sum(path.stat().st_size for path in folder.glob("checkpoints/*.ckpt") if path.is_file())
    if free + held < KEPT * needed:
        log.warning("%s: not enough for the %d that are kept or being written", told, KEPT)
