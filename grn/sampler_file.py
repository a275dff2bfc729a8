"""A sampler as the config group `sampler` has it, and as a YAML file of that form: what grn.calibrate writes."""

from pathlib import Path
from typing import Any

import yaml

from grn.checkpoints.exported import sampler_from_plain
from grn.errors import UserError
from grn.files import write_text
from grn.sampler import Sampler

MAX_BYTES = 1 << 16


def sampler_config(sampler: Sampler) -> dict[str, Any]:
    """The config, in plain containers, that `grn.modules.build_sampler` makes this sampler of."""
    parts = {}
    for name, part in {"sampler": sampler, "schedule": sampler.schedule}.items():
        kind = type(part)
        values = {key: value for key, value in vars(part).items() if value is not None}
        parts[name] = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **values}
    interval = list(sampler.guidance_interval)
    return parts["sampler"] | {"schedule": parts["schedule"], "guidance_interval": interval}


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
        values = yaml.safe_load(content) if len(content) <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("schedule"), dict):
        raise UserError(f"sampler.file={path} is no sampler as python -m grn.calibrate writes it")
    values.pop("_target_", None)
    target = str(values["schedule"].pop("_target_", None))
    values["schedule"]["_class_name"] = target.removeprefix(f"{Sampler.__module__}.")
    return sampler_from_plain(values, path)
