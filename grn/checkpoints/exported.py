"""Exported refiners: one folder that holds all that sampling needs, laid out as diffusers lays out its pipelines.

    model_index.json    which parts there are, the labeling of the tokens, and how to sample
    refiner/            an export of its own: `ClassRefiner.from_pretrained(folder, subfolder="refiner")`
    tokenizer/          likewise of the `HBQTokenizer`; both know where their weights came from (`_provenance`)

Nothing in such a folder names anything to call: a schedule is one of ours by its name, with plain numbers.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from grn.errors import UserError
from grn.files import write_folder, write_json
from grn.hbq import Labeling
from grn.networks.class_refiner import ClassRefiner
from grn.networks.pretrained import (
    CONFIG,
    HUB,
    WEIGHTS,
    brief,
    check_replaceable,
    fetch,
    marks,
    read_config,
    read_marked_json,
)
from grn.networks.tokenizer import HBQTokenizer
from grn.sampler import Cosine, EntropyGuided, Linear, Sampler

INDEX = "model_index.json"
PIPELINE = "GRNPipeline"
PARTS = {"refiner": ClassRefiner, "tokenizer": HBQTokenizer}  # a folder each
FILES = (INDEX, *(f"{part}/{name}" for part in PARTS for name in (CONFIG, WEIGHTS)))
SCHEDULES = {schedule.__name__: schedule for schedule in (Linear, Cosine, EntropyGuided)}
# What a file may ask for: every step is a call of the network, and other numbers meet in float32.
MAX_STEPS, MAX_NUMBER = 10_000, 1e9


@dataclass(frozen=True)
class ExportedRefiner:
    """What a folder holds, on the CPU and in evaluation mode; `step` of the refiner's training where it is known."""

    folder: Path
    refiner: ClassRefiner
    tokenizer: HBQTokenizer
    labeling: Labeling
    sampler: Sampler
    step: int | None


def is_exported_refiner(path_or_hub_id: str | Path) -> bool:
    """Whether it is a folder of this kind, here or (`hf://owner/name`) on the Hub, which is then asked.

    Raises:
        UserError: the Hub cannot be reached, or has no such repository.
    """
    if str(path_or_hub_id).startswith(HUB):
        return (fetch(path_or_hub_id, files=[INDEX]) / INDEX).is_file()
    return (Path(path_or_hub_id).expanduser() / INDEX).is_file()


def save_exported_refiner(
    folder: str | Path,
    *,
    refiner: ClassRefiner,
    tokenizer: HBQTokenizer,
    labeling: Labeling,
    sampler: Sampler,
    provenance: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Writes such a folder: all of it or nothing, and always to the same bytes.

    Args:
        folder: a new or an empty one, or an earlier one of this kind, which is replaced.
        provenance: of `refiner` and of `tokenizer`, as in `Pretrained.save_pretrained`.

    Returns:
        `folder`.

    Raises:
        UserError: `folder` holds something else.
    """
    folder = Path(folder).expanduser()
    _check_replaceable(folder)
    networks = {"refiner": refiner, "tokenizer": tokenizer}
    index = marks(PIPELINE) | {part: ["grn", network.__name__] for part, network in PARTS.items()}
    index |= {"labeling": labeling, "sampler": _plain(sampler)}
    sampler_from_plain(index["sampler"], folder / INDEX)  # a schedule of somebody's own cannot be read again

    def write(temporary: Path) -> None:
        write_json(temporary / INDEX, index)
        for part, network in networks.items():
            network.save_pretrained(temporary / part, provenance=provenance[part])

    return write_folder(folder, write)


def load_exported_refiner(path_or_hub_id: str | Path) -> ExportedRefiner:
    """What `save_exported_refiner` wrote; from the Hub as `hf://owner/name`.

    Raises:
        UserError: not there, not whole, or its values are none; nothing in it is executed.
    """
    folder = fetch(path_or_hub_id, files=FILES)
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder} has no {INDEX}: it is no exported refiner; python -m grn.export writes one")
    index = read_marked_json(path)
    if index["_class_name"] != PIPELINE:
        raise UserError(f"{path} is of a {brief(index['_class_name'])}, not of a {PIPELINE}")
    for part, network in PARTS.items():
        if index.get(part) != ["grn", network.__name__]:
            raise UserError(f"{path}: {part} is {brief(index.get(part))}, this GRN reads a {network.__name__} only")
    if index.get("labeling") not in get_args(Labeling):
        raise UserError(f"{path}: labeling is {brief(index.get('labeling'))}, not {' or '.join(get_args(Labeling))}")
    step = read_config(folder / "refiner")["_provenance"].get("step")
    return ExportedRefiner(
        folder=folder,
        sampler=sampler_from_plain(index.get("sampler"), path),
        labeling=index["labeling"],
        refiner=ClassRefiner.from_pretrained(folder / "refiner"),
        tokenizer=HBQTokenizer.from_pretrained(folder / "tokenizer"),
        step=step if isinstance(step, int) else None,
    )


def _check_replaceable(folder: Path) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        check_replaceable(folder)
        return
    foreign = sorted({entry.name for entry in folder.iterdir()} - {INDEX, *PARTS})
    if foreign or not (folder / INDEX).is_file() or read_marked_json(folder / INDEX)["_class_name"] != PIPELINE:
        raise UserError(f"{folder} holds other things ({(foreign or ['not from here'])[0]}): choose a new folder")
    for part in PARTS:
        check_replaceable(folder / part)


def _plain(sampler: Sampler) -> dict[str, Any]:
    """A sampler as JSON holds it."""
    schedule = {name: value for name, value in vars(sampler.schedule).items() if value is not None}
    return vars(sampler) | {"schedule": {"_class_name": type(sampler.schedule).__name__, **schedule}}


def sampler_from_plain(values: Any, path: Path) -> Sampler:
    """What `_plain` made, of any values that a file may hold; what is left out has its default."""
    values = dict(values) if isinstance(values, dict) else {}
    schedule = values.pop("schedule", None)
    name = schedule.get("_class_name") if isinstance(schedule, dict) else None
    if not isinstance(name, str) or name not in SCHEDULES:
        raise UserError(f"{path}: sampler.schedule is {brief(name)}, not one of {', '.join(SCHEDULES)}")
    schedule = {key: value for key, value in schedule.items() if key != "_class_name"}
    for where, known, given in (("sampler.schedule", SCHEDULES[name], schedule), ("sampler", Sampler, values)):
        defaults = {field.name: field.default for field in fields(known) if field.default not in (None, MISSING)}
        for key, value in given.items():
            if key not in defaults:
                raise UserError(f"{path}: nothing here knows {where}.{brief(key)}; use a later GRN")
            if not _is_like(defaults[key], value):
                raise UserError(f"{path}: {where}.{key} cannot be {brief(value)}")
    try:
        return Sampler(schedule=SCHEDULES[name](**schedule), **values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _is_like(default: int | float | tuple, value: Any) -> bool:
    """Whether a setting with this default can be `value`, and is nothing that only looks like a number."""
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and len(value) == len(default) and all(map(_is_like, default, value))
    if isinstance(default, int):
        return type(value) is int and abs(value) <= MAX_STEPS
    return type(value) in (int, float) and abs(value) <= MAX_NUMBER
