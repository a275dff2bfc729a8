"""Shared by all entry points: the config folder, resolvers, errors in one line.

Nothing heavy may be imported here: what a command does is imported when its config is composed.
"""

import argparse
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.main import get_args_parser
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from grn.cli.checks import check_cluster, check_given
from grn.cli.help import page
from grn.cli.options import folder_at, folders_of, outlived
from grn.cli.words import trial_of_a_sweep, without_dashes
from grn.data.manifest import read_manifest
from grn.runs.sweeps import Failed
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.runtime.failures import MISTAKES, explain, named
from grn.runtime.files import FULL, UNWRITABLE, no_space, unwritable
from grn.runtime.interruption import stops_on_signals
from grn.runtime.locks import only_writer
from grn.runtime.overrides import literal
from grn.runtime.ranks import is_first, place
from grn.runtime.wandb_login import wandb_offline
from grn.weights.kinds import HUB, INDEX, is_pretrained, is_sharded_checkpoint


def entry_point(
    config_name: str,
    *,
    jointly: bool = False,
    writes: str | None = None,
    reads: bool = False,
    light: bool = False,
) -> Callable[[Callable[[DictConfig], object]], Callable[[], None]]:
    """Decorates a task into a Hydra command whose mistakes of usage end with one line on stderr and exit status 1.

    Args:
        jointly: several processes end with the same mistake, or tell the first one of theirs: it says it for all.
        writes: the config key of the file or folder that it writes; None: into Hydra's output folder, of each point of
            a sweep its own. No other command may write there meanwhile; several processes of one share the work.
        reads: it writes nothing.
        light: it may do without torch, so that its config is not checked against what it names (`grn.cli.schema`).
    """

    def decorate(task: Callable[[DictConfig], object]) -> Callable[[], None]:
        failed: list[str] = []  # points of a sweep

        @functools.wraps(task)
        def explained(config: DictConfig) -> object:
            if not _goes_on():
                return single(config)
            try:
                return single(config)
            except SystemExit as exit:
                if not isinstance(exit.code, str):  # a signal
                    raise
                reason = exit.code.removeprefix("error: ")
            except Exception as error:  # a bug, or the machine's
                traceback.print_exc()
                reason = explain(error)
            point = str(HydraConfig.get().job.num)
            print(f"error: point {point}: {reason}", file=sys.stderr)
            failed.append(point)
            return Failed(reason)

        vars(explained)["failed"] = failed  # for points in other processes (hydra_plugins/grn_parallel.py)

        def single(config: DictConfig) -> object:
            try:
                _drop_outlived(config)
                check_cluster(config, HydraConfig.get())
                check_given(config)
                if not light:
                    from grn.cli.schema import check_settings  # which imports what is built, and torch

                    check_settings(config)
                with nullcontext() if reads else _only_writer(config, writes):
                    return task(config)
            except MISTAKES as error:
                if jointly and place()[0] > 0:
                    sys.exit(1)
                _leave_no_trace()
                sys.exit(f"error: {explain(error)}")  # here already: Hydra would print a line of its own first
            except OSError as error:
                if jointly and place()[0] > 0 and _explain_disk(error):
                    sys.exit(1)
                if (told := _explain_disk(error)) is None:
                    raise
                sys.exit(f"error: {told}")
            except (RuntimeError, MemoryError) as error:
                if (told := named(error)) is None:
                    raise
                sys.exit(f"error: {told}")

        @functools.wraps(task)
        def main() -> None:
            # Hydra then raises instead of printing its own page of advice and exiting.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            command = hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")(explained)
            try:
                place()  # which all that follows asks, errors too
            except UserError as error:
                sys.exit(f"error: {error}")
            try:
                sys.argv[1:] = without_dashes(sys.argv[1:])
                given = _parsed(sys.argv[1:])
                if given.shell_completion:
                    return _complete(command, given.overrides)
                _check_arguments(given.overrides)
                searches = any(argument.startswith("+search=") for argument in given.overrides)
                sweep = given.multirun or searches or "hydra.mode=MULTIRUN" in given.overrides
                overrides = literal(given.overrides, sweep=sweep)
                folders = folders_of(given.config_dir, overrides, given.config_name or config_name)
                overrides = [*outlived(overrides, CONF, folders), *overrides]
                overrides += trial_of_a_sweep(overrides) if config_name == "train" else []
                overrides.sort(key=lambda it: it.startswith("+debug="))  # on top of the experiment, in any order
                if given.help or given.help_all:
                    name = given.config_name or config_name
                    print(page(name, overrides, CONF, folders, every=given.help_all))
                    sys.exit(0)
                multirun = ["--multirun"] if searches and not given.multirun else []
                sys.argv[1:] = [*_flags(sys.argv[1:], given.overrides), *multirun, *overrides]
                with stops_on_signals():
                    command()
                if failed:
                    count, points = len(failed), ", ".join(failed)
                    failed.clear()
                    sys.exit(
                        f"error: {count} point{'s' * (count > 1)} of the sweep failed: {points}; table.csv names why"
                    )
            except MISTAKES as error:
                # Before the task starts, what is wrong is wrong for every process: the first one says it.
                sys.exit(f"error: {explain(error)}" if place()[0] == 0 else 1)
            except OSError as error:  # of the output folder, which Hydra makes
                if (told := _explain_disk(error)) is None:
                    raise
                sys.exit(f"error: {told}" if place()[0] == 0 else 1)

        return main

    return decorate


def _goes_on() -> bool:
    """Whether this is a point of a sweep on this machine, whose other points need not end with it."""
    running = HydraConfig.get()
    here = str(running.launcher.get("_target_")).endswith((".BasicLauncher", ".ParallelLauncher"))
    return running.mode == RunMode.MULTIRUN and here and place()[2] == 1


def _only_writer(config: DictConfig, key: str | None) -> AbstractContextManager:
    """See `entry_point`."""
    if not is_first():
        return nullcontext()
    if key is None:
        remedy = "give another name=..." if "run" in config.get("paths", {}) else "give another out=..."
        return only_writer(Path(HydraConfig.get().runtime.output_dir), inside=True, remedy=remedy)
    path = OmegaConf.select(config, key)
    if path is None:
        return nullcontext()
    return only_writer(Path(path).expanduser().absolute(), inside=False, remedy=f"give another {key}=...")


def _leave_no_trace() -> None:
    """Removes the folder that Hydra made for a start that failed: where nothing but its log is in it, and nobody named
    it."""
    running = HydraConfig.get()
    folder, log = Path(running.runtime.output_dir), f"{running.job.name}.log"
    named = any(re.match(r"\+*(out|paths\.run|hydra\..*)=", override) for override in running.overrides.task)
    if named or running.mode == RunMode.MULTIRUN or not is_first():
        return
    with suppress(OSError):
        if os.listdir(folder) == [log]:
            (folder / log).unlink()
            folder.rmdir()


def _explain_disk(error: OSError) -> str | None:
    """One line where the file that an error names is what is wrong."""
    if error.errno in FULL:
        return no_space(error.filename or HydraConfig.get().runtime.output_dir)
    if error.errno in UNWRITABLE and error.filename is not None:
        return unwritable(error)
    return None


def _drop_outlived(config: DictConfig) -> None:
    """In a sweep over options, of which each has keys of its own; otherwise arguments have done it (`outlived`)."""
    running = HydraConfig.get()
    if running.mode != RunMode.MULTIRUN:
        return
    sources = [it for it in running.runtime.config_sources if it.provider not in ("hydra", "main", "schema")]
    folders = [folder for it in sources if (folder := folder_at(f"{it.schema}://{it.path}")) is not None]
    for argument in outlived(running.overrides.task, CONF, folders):
        name, _, value = argument.partition("=")
        parent, _, key = name.lstrip("~").rpartition(".")
        node = OmegaConf.select(config, parent)
        with open_dict(node):
            if value:
                node[key] = None
            else:
                node.pop(key, None)


def _parsed(arguments: list[str]) -> argparse.Namespace:
    """Hydra's own options, and the overrides in any order among them."""

    def complain(message: str) -> NoReturn:
        if odd := re.search(r"--?([\w.]+)=", message):
            raise UserError(f"{message}: keys have no dashes, {odd[1]}=...")
        raise UserError(f"{message}; --help lists what there is")

    parser = get_args_parser()
    parser.add_argument("--help-all", action="store_true")
    parser.error = complain  # instead of a page of usage
    return parser.parse_intermixed_args(arguments)


def _flags(arguments: list[str], overrides: list[str]) -> list[str]:
    """Arguments that are no overrides; Hydra wants these in one piece."""
    flags, rest = [], list(overrides)
    for argument in reversed(arguments):
        if rest and argument == rest[-1]:
            rest.pop()
        else:
            flags.append(argument)
    return flags[::-1]


def _complete(command: Callable[[], None], overrides: list[str]) -> None:
    """Hydra's shell completion; a line that cannot be completed gets nothing, where its errors would be inserted."""
    if not any(override.startswith("query=") for override in overrides):
        sys.argv[0] = "grn"  # what shells complete: Hydra's scripts know no `python -m`
        return command()
    try:
        return command()
    except Exception:
        return None


def _check_arguments(arguments: list[str]) -> None:
    """Raises:
    UserError: two arguments set the same key, of which Hydra would take the last; or one sets a group to null.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        if "=" in argument and not argument.startswith("-"):
            key = argument.partition("=")[0].lstrip("+~")
            if key in given:
                raise UserError(f"{key} is set twice, by {given[key]} and by {argument}: leave one out")
            if argument.endswith("=null") and (CONF / key).is_dir() and "." not in key:
                options = ", ".join(sorted(path.stem for path in (CONF / key).glob("*.yaml")))
                raise UserError(f"{argument}: {key} is a group of options, choose one of {options}")
            given[key] = argument


def _scaled_rate(rate: float, batch_size: int, accumulated: int) -> float:
    """A learning rate given for a global batch of 256, at another one (Goyal et al., arXiv 1706.02677)."""
    return rate * batch_size * accumulated / 256


def _steps(epochs: float, samples: int | None, batch_size: int, accumulated: int = 1) -> int:
    if samples is None:
        raise UserError("data.train_samples is not known (no manifest in data.root): give it, epochs are counted by it")
    return round(epochs * samples / (batch_size * accumulated))


def _run_folder(ckpt: str | None, *, _root_: DictConfig) -> str:
    """Where what is made of a checkpoint goes: its run folder, the folder of a file, one beside an export.

    A sweep over checkpoints has no `ckpt` before its points have: it goes where its first point goes.
    """
    if ckpt is None:
        given = OmegaConf.select(_root_, "hydra.overrides.task", default=[])
        swept = [
            override for override in OverridesParser.create().parse_overrides(given) if override.key_or_group == "ckpt"
        ]
        if not swept or not swept[0].is_sweep_override():
            raise UserError("ckpt must be given: add ckpt=... to the command")
        ckpt = next(swept[0].sweep_string_iterator())
    if ckpt.startswith(HUB):
        return str(Path(os.environ.get("GRN_RUNS", "runs"), ckpt.removeprefix(HUB).replace("/", "--")))
    path = Path(ckpt)
    if is_pretrained(ckpt) or (path.expanduser() / INDEX).is_file():
        return f"{path}_results"  # what else an export's folder held would be in the way of exporting again
    if path.is_dir() and not is_sharded_checkpoint(path):
        return str(path)
    return str(path.parent.parent if path.parent.name == "checkpoints" else path.parent)


def _train_samples(root: str) -> int | None:
    """Size of the training split of prepared or encoded data; None where there is no manifest."""
    manifest = read_manifest(root)
    return manifest["splits"]["train"]["samples"] if manifest and "train" in manifest["splits"] else None


def _manifest(root: str, key: str) -> Any:
    """A fact of prepared data; None where there is no manifest, or it does not tell."""
    return (read_manifest(root) or {}).get(key)


def _streams(root: str) -> int:
    """How many streams read prepared data side by side: a power of two, 8 at most, and no more than training shards."""
    splits = _manifest(root, "splits")
    shards = 8 if splits is None else len(splits.get("train", {}).get("shards", ()))
    return 1 << min(3, max(1, shards).bit_length() - 1)


def _latents(size: int | None, stride: int) -> int | None:
    """Of images of so many pixels a side, the tokens a side of a tokenizer of this stride; None: not known."""
    if size is not None and size % stride:
        raise UserError(f"data.image_size={size} must be a multiple of the tokenizer's stride {stride}: prepare again")
    return None if size is None else size // stride


def _sampler_file(path: str, key: str) -> object:
    """A value of a sampler that grn.calibrate wrote."""
    if not Path(path).expanduser().is_file():
        raise UserError(f"sampler.file: there is no {path}; python -m grn.calibrate ckpt=... writes one")
    from grn.checkpoints.sampler_config import read_sampler, sampler_config

    return sampler_config(read_sampler(path))[key]


def _relative(path: str, folder: str) -> str:
    """`path` as seen from `folder`; its last part where it lies elsewhere."""
    place, above = Path(path).absolute(), Path(folder).absolute()
    return str(place.relative_to(above)) if place.is_relative_to(above) else place.name


def _choices(*groups: str) -> ListConfig:
    """The options that were chosen of config groups; none outside a command."""
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return OmegaConf.create([chosen[group] for group in groups if chosen.get(group)])


OmegaConf.register_new_resolver("relative", _relative, replace=True)
OmegaConf.register_new_resolver("choices", _choices, replace=True)
OmegaConf.register_new_resolver("train_samples", _train_samples, replace=True)
OmegaConf.register_new_resolver("manifest", _manifest, replace=True)
OmegaConf.register_new_resolver("streams", _streams, replace=True)
OmegaConf.register_new_resolver("latents", _latents, replace=True)
OmegaConf.register_new_resolver("steps", _steps, replace=True)
OmegaConf.register_new_resolver("scaled_rate", _scaled_rate, replace=True)
OmegaConf.register_new_resolver("wandb_offline", wandb_offline, replace=True)
OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
OmegaConf.register_new_resolver("sampler_file", _sampler_file, replace=True)
