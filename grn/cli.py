"""What every entry point shares: where the configuration lives, resolvers, and errors that fit on one line."""

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlparse

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from grn.checkpoints.exported import is_exported_refiner
from grn.checkpoints.sharded import is_sharded_checkpoint
from grn.data.shards import read_manifest
from grn.errors import UserError
from grn.files import FULL, no_space
from grn.launch import place
from grn.networks.pretrained import HUB, is_pretrained
from grn.sampler_file import read_sampler, sampler_config

_PACKAGE = Path(__file__).resolve().parent
# A checkout keeps conf/ at its top; an installed wheel carries it inside the package (pyproject.toml).
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())

# What a user can mend; anything else is a bug and keeps its traceback.
MISTAKES = (UserError, HydraException, OmegaConfBaseException, MisconfigurationException)


def entry_point(config_name: str) -> Callable[[Callable[[DictConfig], object]], Callable[[], None]]:
    """Decorates a task into a Hydra command whose mistakes of usage end with one line on stderr and exit status 1."""

    def decorate(task: Callable[[DictConfig], object]) -> Callable[[], None]:
        @functools.wraps(task)
        def explained(*arguments: object) -> object:
            try:
                return task(*arguments)
            except MISTAKES as error:
                sys.exit(f"error: {explain(error)}")  # here already: Hydra would print a line of its own first
            except OSError as error:
                if error.errno not in FULL:
                    raise
                path = error.filename or HydraConfig.get().runtime.output_dir
                sys.exit(f"error: {no_space(path)}")

        @functools.wraps(task)
        def main() -> None:
            # Hydra then raises instead of printing its own page of advice and exiting.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            command = hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")(explained)
            try:
                _check_given_once(sys.argv[1:])
                command()
            except MISTAKES as error:
                # Before the task starts, what is wrong is wrong for every process: the first one says it.
                sys.exit(f"error: {explain(error)}" if place()[0] == 0 else 1)

        return main

    return decorate


def explain(error: BaseException) -> str:
    """One line for an error of usage: the innermost cause that speaks to the user, and near misses of a wrong key."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for cause in chain:
        if isinstance(cause, UserError):
            return _one_line(str(cause))
    for cause in chain:
        if told := re.search(r"UserError raised while resolving interpolation: (.*)", str(cause)):
            return told.group(1)
        if missing := re.search(r"[Mm]issing mandatory value: (\S+)", str(cause)):
            return f"{missing.group(1)} must be given: add {missing.group(1)}=... to the command"
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.key is not None:
            return _unknown_key(cause)
    if isinstance(error, MissingConfigException):
        return _one_line(str(error).partition("Config search path")[0])
    if isinstance(error, InstantiationException) and len(chain) > 1:
        where = re.search(r"full_key: (\S+)", str(error))
        return f"{where.group(1) if where else 'config'}: {_one_line(str(chain[-1]))}"
    return _one_line(str(error))


def _unknown_key(error: ConfigAttributeError | ConfigKeyError) -> str:
    siblings = [str(key) for key in error.parent_node] if isinstance(error.parent_node, DictConfig) else []
    near = difflib.get_close_matches(str(error.key), siblings, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(siblings)}"
    if not siblings:
        hint = "what it would stand under is null here: choose that first, e.g. sampler=entropy or scores=digits"
    return f"no config key {error.full_key or error.key!r}; {hint}"


def _check_given_once(arguments: list[str]) -> None:
    """Raises:
    UserError: two arguments set the same key, of which Hydra would take the last.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        if "=" in argument and not argument.startswith("-"):
            key = argument.partition("=")[0].lstrip("+~")
            if key in given:
                raise UserError(f"{key} is set twice, by {given[key]} and by {argument}: leave one out")
            given[key] = argument


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _steps(epochs: float, samples: int | None, batch_size: int) -> int:
    if samples is None:
        raise UserError("data.train_samples is not known (no manifest in data.root): give it, epochs are counted by it")
    return round(epochs * samples / batch_size)


def _wandb_offline() -> bool:
    """True unless somebody is logged in (an API key in the environment or in netrc) or WANDB_MODE says otherwise."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode != "online"
    if os.environ.get("WANDB_API_KEY"):
        return False
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is None
    except (OSError, NetrcParseError):
        return True


def _run_folder(ckpt: str) -> str:
    """Where what is made of a checkpoint goes: its run folder, the folder of a file, one beside an export."""
    if ckpt.startswith(HUB):
        return str(Path(os.environ.get("GRN_RUNS", "runs"), ckpt.removeprefix(HUB).replace("/", "--")))
    path = Path(ckpt)
    if is_pretrained(ckpt) or is_exported_refiner(ckpt):
        return f"{path}_results"  # what else an export's folder held would be in the way of exporting again
    if path.is_dir() and not is_sharded_checkpoint(path):
        return str(path)
    return str(path.parent.parent if path.parent.name == "checkpoints" else path.parent)


def _train_samples(root: str) -> int | None:
    """Size of the training split of prepared or encoded data; None where there is no manifest."""
    manifest = read_manifest(root)
    return manifest["splits"]["train"]["samples"] if manifest and "train" in manifest["splits"] else None


def _sampler_file(path: str, key: str) -> object:
    """A value of a sampler that grn.calibrate wrote."""
    return sampler_config(read_sampler(path))[key]


def _relative(path: str, folder: str) -> str:
    """`path` as seen from `folder`; its last part where it lies elsewhere."""
    path, folder = Path(path).absolute(), Path(folder).absolute()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name


def _choices(*groups: str) -> list[str]:
    """The options that were chosen of config groups; none outside a command."""
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return [chosen[group] for group in groups if chosen.get(group)]


OmegaConf.register_new_resolver("relative", _relative, replace=True)
OmegaConf.register_new_resolver("choices", _choices, replace=True)
OmegaConf.register_new_resolver("train_samples", _train_samples, replace=True)
OmegaConf.register_new_resolver("steps", _steps, replace=True)
OmegaConf.register_new_resolver("wandb_offline", _wandb_offline, replace=True)
OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
OmegaConf.register_new_resolver("sampler_file", _sampler_file, replace=True)
