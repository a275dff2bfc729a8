"""Checks before torch is imported: mandatory values and missing files."""

import glob
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from grn.data.manifest import how_to_make, read_manifest, token_manifest
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError, check_count
from grn.runtime.ranks import place
from grn.weights.kinds import HUB, INDEX, checkpoints_at, is_pretrained
from grn.weights.releases import check_task_given, find_release

OF_PIXELS = ("grn.data.images", "grn.data.videos", "grn.data.text_images", "grn.data.text_videos")
RESULTS = ("samples", "evaluation", "calibration")  # what goes into a run folder unless out=... says otherwise
OF_TOKENS = ("grn.data.tokens", "grn.data.text_tokens")
# Of a cluster's keys, those that say how to train; others say where a command runs.
OF_TRAINING = ("accelerator", "strategy", "precision", "matmul_precision")
OF_TRAINING += ("activation_checkpointing", "compile", "compile_mode")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
# What Lightning takes besides: other names of these, and what a library brings.
OTHER_PRECISIONS = ("32", "bf16", "16", "64", "transformer-engine", "transformer-engine-float16")
MATMUL_PRECISIONS = ("highest", "high", "medium")  # torch's


def is_for(cluster: str, verb: str) -> bool:
    """Whether a command takes this option of the group `cluster`, of those that are here."""
    return cluster != "none" if verb == "train" else cluster == "none" or cluster.startswith("slurm")


def check_cluster(config: DictConfig, running: DictConfig | HydraConf) -> None:
    """Of every command, before its job is submitted, too; `running`: Hydra's part of the config.

    Raises:
        UserError: the command has no use for what was chosen of the group `cluster`, or for one of its keys, or one has
            a value that it cannot have.
    """
    if "cluster" not in config:
        return
    _check_values(config.cluster)
    verb, cluster = running.job.config_name, running.runtime.choices.get("cluster")
    if verb == "train":
        if cluster == "none":
            raise UserError(f"cluster=none is not for grn.train: choose cluster=auto, cpu, gpu, ddp, ..., or {_jobs()}")
        return
    if cluster != "none" and "dry_run" not in config.cluster:
        raise UserError(f"cluster={cluster} says how to train: grn.{verb} takes {_jobs()}; or start it by torchrun")
    for override in running.overrides.task:
        key = override.partition("=")[0].lstrip("+~")
        if key.startswith("cluster.") and key.split(".")[1] in OF_TRAINING:
            raise UserError(f"{key} says how to train: leave it out; grn.{verb} --help lists its own keys")
    if verb == "sample":
        tasks = place()[2] if cluster == "none" else config.cluster.devices * config.cluster.num_nodes
        if tasks != 1:
            raise UserError(f"grn.sample is one process, and each of {tasks} would draw all: take cluster=slurm")


def _check_values(cluster: DictConfig) -> None:
    if "num_nodes" in cluster:
        check_count("cluster.num_nodes", cluster.num_nodes)
    if "devices" in cluster and not _are_devices(cluster.devices):
        raise UserError(
            f"cluster.devices={cluster.devices} must be auto, a number of at least 1, or a list of devices' numbers"
        )
    for key, values, others in (
        ("precision", PRECISIONS, OTHER_PRECISIONS),
        ("matmul_precision", MATMUL_PRECISIONS, ()),
    ):
        if key in cluster and str(cluster[key]) not in (*values, *others):
            raise UserError(f"cluster.{key}={cluster[key]} must be one of {', '.join(values)}")


def _are_devices(value: Any) -> bool:
    """What Lightning takes: of texts, "2" and "0,1", too; -1 is all."""
    if isinstance(value, str):
        numbers = [part.strip() for part in value.split(",") if part.strip()]  # "1,": the second one alone
        return value in ("auto", "-1") or (bool(numbers) and all(map(str.isdigit, numbers)) and value != "0")
    if isinstance(value, ListConfig):
        return bool(value) and all(type(number) is int and number >= 0 for number in value)
    return type(value) is int and (value == -1 or value > 0)


def _jobs() -> str:
    """The options of the group that are SLURM's jobs."""
    return ", ".join(f"cluster={path.stem}" for path in sorted((CONF / "cluster").glob("slurm*.yaml")))


def check_given(config: DictConfig) -> None:
    """Raises:
    UserError: a mandatory value is missing, a number is NaN or infinite, or nothing is at one of the paths that
        commands read from the start.
    """
    # Unresolved: what a command fills in later, evaluate's training.prompts for one, is not there yet.
    values = list(_values(OmegaConf.to_container(config, resolve=False)))
    if missing := sorted(key for key, value in values if value == "???"):
        raise UserError(f"{missing[0]} must be given: add {missing[0]}=... to the command")
    for key, value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} must be a finite number")
    official = OmegaConf.select(config, "tokenizer.model") is not None
    if config.get("task") is not None:
        _check_release(config)
    elif config.get("model_size") is not None:
        raise UserError(f"model_size={config.model_size} is of the authors' weights: give task=..., too, e.g. task=t2i")
    elif isinstance(config.get("ckpt"), str):
        _check_checkpoint(config.ckpt, "ckpt", official=official or config.get("model") is not None)
    elif isinstance(path := OmegaConf.select(config, "tokenizer.ckpt"), str):
        _check_checkpoint(path, "tokenizer.ckpt", official=official)
    for key in ("model.weights", "text_encoder.weights", "training.perceptual.weights"):
        path = OmegaConf.select(config, key)
        if isinstance(path, str) and not is_pretrained(path) and not Path(path).expanduser().exists():
            raise UserError(f"{key}: no such file: {path}")
    if "source" not in config and isinstance(config.get("data"), DictConfig):  # prepare makes the data
        _check_data(config.data, "data", every="training" in config)
    if isinstance(out := config.get("out"), str) and Path(out).name in RESULTS and HydraConfig.initialized():
        given = any(override.startswith("out=") for override in HydraConfig.get().overrides.task)
        check_links(Path(out).expanduser(), given=given)
    for key in ("init", "mask") if config.get("init") is not None else ():
        if isinstance(path := config.get(key), str) and not Path(path).expanduser().is_file():
            raise UserError(f"{key}={path}: there is no such file")
    if isinstance(path := config.get("prompts"), str) and not Path(path).expanduser().is_file():
        raise UserError(f"prompts: no file {path}; prompts themselves are given as a list: prompts=[...]")


def _values(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values of plain containers, by their keys: `training.learning_rate`, `sampler.guidance_interval[0]`."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _values(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _values(value, f"{key}[{number}]")
    else:
        yield key, node


def check_links(out: Path, *, given: bool) -> None:
    """A run folder may be somebody else's: what stands in it leads nobody's results elsewhere.

    Args:
        out: the folder of results.
        given: whether the user named it, and may so mean a link.

    Raises:
        UserError: it, or a folder in it, is a link that leads out of it.
    """
    inside = [] if not out.is_dir() else [entry for entry in out.iterdir() if entry.is_symlink() and entry.is_dir()]
    for entry in ([] if given or not out.is_symlink() else [out]) + inside:
        if not entry.resolve().is_relative_to(entry.parent.resolve()):
            raise UserError(
                f"out={out}: {entry} is a link out of its folder, to {entry.readlink()}; give another out=..."
            )


def _check_release(config: DictConfig) -> None:
    size = config.get("model_size")
    find_release(config.task, None if size is None else str(size), size_key="model_size")
    if not is_pretrained(config.ckpt) and not Path(config.ckpt).expanduser().is_dir():
        raise UserError(
            f"ckpt: no folder {config.ckpt}; task={config.task} takes the authors' repository, "
            "ckpt=hf://bytedance-research/GRN, or a folder of its files"
        )
    if OmegaConf.select(config, "tokenizer.model") is not None:
        raise UserError(f"task={config.task} chooses its tokenizer: leave tokenizer out")


def _check_checkpoint(path: str, key: str, *, official: bool) -> None:
    if official:
        if not path.startswith(HUB) and not Path(path).expanduser().is_file():
            raise UserError(f"{key}: no such file: {path}; give the path of one of the authors' checkpoints")
        return
    check_task_given(path)
    if not is_pretrained(path) and not (Path(path).expanduser() / INDEX).is_file():
        checkpoints_at(path, key=key)


def _check_data(data: DictConfig, key: str, *, every: bool) -> None:
    """Of our own kinds of data; others know for themselves what they need. One split or `every` must be there."""
    module, _, _ = str(data.get("_target_")).rpartition(".")
    if isinstance(data.get("parts"), DictConfig):
        for name, part in data.parts.items():
            _check_data(part, f"{key}.parts.{name}", every=every)
    elif module in OF_TOKENS and data.root is not None:
        token_manifest(data.root, key=key)
    elif module in OF_PIXELS and data.root is not None and read_manifest(data.root) is None:
        patterns = {split: Path(data.root, f"{split}-*.tar") for split in ("train", "val")}
        absent = [s for s in patterns if data.get(s) is None and not glob.glob(str(patterns[s]))]
        if len(absent) == 2 or (absent and every):
            what = f"{key}.{absent[0]}"
            raise UserError(f"{what}: no shards at {patterns[absent[0]]}; {how_to_make(data.name, what)}")
