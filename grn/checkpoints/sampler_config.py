"""The sampler of a config, and the YAML file that grn.calibrate writes."""

from pathlib import Path
from typing import Any

import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from grn.checkpoints.exported import sampler_from_plain
from grn.method.sampler import Sampler
from grn.method.schedules import FIXED, EntropyGuided, Linear
from grn.runtime.configs import plain
from grn.runtime.errors import UserError
from grn.runtime.files import write_text

MAX_BYTES = 1 << 16


class _Plain(yaml.SafeLoader):
    """Without aliases: ten lines of them stand for more values than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def sampler_config(sampler: Sampler) -> dict[str, Any]:
    """The config, in plain containers, that `build_sampler` makes this sampler of."""
    parts = {}
    for name, part in {"sampler": sampler, "schedule": sampler.schedule}.items():
        values = {key: value for key, value in vars(part).items() if value is not None}
        parts[name] = {"_target_": target(type(part)), **values}
    pairs = {name: list(getattr(sampler, name)) for name in ("guidance_interval", "kappa_window")}
    return parts["sampler"] | {"schedule": parts["schedule"], **pairs}


def target(kind: type) -> str:
    """What `_target_` of a config says of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def write_sampler(path: Path, sampler: Sampler, remark: str) -> Path:
    """Writes the file atomically, `remark` as its first lines."""
    comment = "".join(f"# {line}\n" for line in remark.splitlines())
    return write_text(path, comment + yaml.safe_dump(sampler_config(sampler), sort_keys=False))


def read_sampler(path: str | Path) -> Sampler:
    """What `write_sampler` wrote; nothing that the file names is called but a schedule of ours.

    Raises:
        UserError: not there, or its values are none of a sampler.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"sampler.file: there is no {path}; python -m grn.calibrate ckpt=... writes one")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        values = yaml.load(content, _Plain) if len(content) <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("schedule"), dict):
        raise UserError(f"sampler.file={path} is not a sampler file of python -m grn.calibrate")
    values.pop("_target_", None)
    target = str(values["schedule"].pop("_target_", None))
    values["schedule"]["_class_name"] = target.removeprefix(f"{Linear.__module__}.")
    return sampler_from_plain(values, path)


def build_sampler(config: DictConfig | dict, fallback: Sampler | DictConfig | dict | None = None) -> Sampler:
    """A `Sampler` from its config, nulls taken from `fallback` (a trained module's, or the config of one) and then from
    the defaults.

    A schedule's keys fall back only on a schedule of the same kind; but the grid of an entropy-guided one falls back on
    that of any schedule, so that adaptive steps follow what the weights were tuned for.
    """
    if isinstance(fallback, Sampler):
        fallback = sampler_config(fallback)
    configs = (c if isinstance(c, DictConfig) else OmegaConf.create(c or {}) for c in (config, fallback))
    chosen, trained = (plain(c, resolve=True) for c in configs)  # in its place, for what it refers to
    schedule, trained_schedule = chosen.pop("schedule", None), trained.pop("schedule", None) or {}
    if schedule is None:
        schedule = trained_schedule
    elif schedule.get("_target_") == trained_schedule.get("_target_"):
        schedule = _filled(schedule, trained_schedule)
    elif schedule.get("_target_") == target(EntropyGuided):
        grid = _grid(trained_schedule)
        if schedule.get("grid") in (None, grid.get("grid")):
            schedule = _filled(schedule, grid)
    chosen = _filled(chosen, trained)
    if schedule:
        chosen["schedule"] = instantiate(_filled(schedule))
    for key in ("_target_", "file"):  # where the values of sampler=calibrated are from
        chosen.pop(key, None)
    return Sampler(**_filled(chosen))


def _grid(fixed: dict[str, Any]) -> dict[str, Any]:
    """The keys of `EntropyGuided` that make it advance along the grid of a fixed schedule's config."""
    kinds: dict[Any, Any] = {target(kind): kind for kind in FIXED.values()}
    kind = kinds.get(fixed.get("_target_"))
    return {} if kind is None else {"grid": kind.grid} | {key: fixed.get(key) for key in ("alpha", "cap")}


def _filled(values: dict[str, Any], fallback: dict[str, Any] | None = None) -> dict[str, Any]:
    merged = (fallback or {}) | {key: value for key, value in values.items() if value is not None}
    return {key: value for key, value in merged.items() if value is not None}
