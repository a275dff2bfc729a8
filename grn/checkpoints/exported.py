"""Exported refiners: one folder that holds all that sampling needs, laid out as diffusers lays out its pipelines.

    model_index.json    which parts there are, the labeling of the tokens, and how to sample
    refiner/            an export of its own: `ClassRefiner.from_pretrained(folder, subfolder="refiner")`
    tokenizer/          likewise of the `HBQTokenizer`; both know where their weights came from (`_provenance`)

Of text, `refiner/` holds a `TextRefiner`, the index also what is drawn unless told otherwise, and there is

    text_encoder/       an export of a `ByteT5`; or the config.json alone of a `PretrainedT5`: where that is to be had

Nothing in such a folder names anything to call: a schedule is one of ours by its name, with plain numbers. But a
refiner and a schedule may be classes of a package that GRN_TRUST names.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from hydra.utils import get_object

from grn.method.hbq import Labeling
from grn.method.sampler import Sampler
from grn.method.schedules import MAX_STEPS, Cosine, EntropyGuided, Linear, Schedule, Shifted
from grn.networks.class_refiner import ClassRefiner
from grn.networks.text_encoder import ByteT5, PretrainedT5, TextEncoder
from grn.networks.text_refiner import TextRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError
from grn.runtime.files import write_folder, write_json
from grn.weights.kinds import CARD, CONFIG, HUB, INDEX, PICTURE, WEIGHTS
from grn.weights.pretrained import (
    MAX_CONFIG_BYTES,
    Pretrained,
    brief,
    check_replaceable,
    fetch,
    marks,
    read_config,
    read_marked_json,
)
from grn.weights.reading import trusted

PIPELINE = "GRNPipeline"
# A folder each, and what may be in it; only text refiners have the third.
PARTS = {
    "refiner": (ClassRefiner, TextRefiner),
    "tokenizer": (HBQTokenizer,),
    "text_encoder": (ByteT5, PretrainedT5),
}
FILES = (INDEX, *(f"{part}/{name}" for part in ("refiner", "tokenizer") for name in (CONFIG, WEIGHTS)))
TEXT_FILES = tuple(f"text_encoder/{name}" for name in (CONFIG, WEIGHTS))
# Of GRN; one of another package is named in full, and read where GRN_TRUST names the package.
SCHEDULES = {schedule.__name__: schedule for schedule in (Linear, Cosine, Shifted, EntropyGuided)}
# What a file may ask for: numbers meet in float32; pixels or frames of a side.
MAX_NUMBER, MAX_SIDE = 1e9, 1 << 14


@dataclass(frozen=True)
class TextSide:
    """What a text refiner has beside: its encoder, what is drawn unless somebody asks for something else (prompts, a
    negative prompt, (height, width) in pixels, frames), how many first latents it was trained to go on from, and what
    every prompt stands between (`context_prefix`: before those of clips that go on from given latents; None: the same).
    """

    encoder: TextEncoder
    prompts: Sequence[str]
    negative_prompt: str
    size: tuple[int, int]
    frames: int = 1
    context_latents: int = 0
    prompt_prefix: str = ""
    prompt_suffix: str = ""
    context_prefix: str | None = None


@dataclass(frozen=True)
class ExportedRefiner:
    """What a folder holds, on the CPU and in evaluation mode; `step` of the refiner's training where it is known;
    `provenance` by part; `text` of text refiners."""

    folder: Path
    refiner: ClassRefiner | TextRefiner
    tokenizer: HBQTokenizer
    labeling: Labeling
    sampler: Sampler
    step: int | None
    provenance: dict[str, dict[str, Any]]
    text: TextSide | None


def is_exported_refiner(path_or_hub_id: str | Path, **hub: Any) -> bool:
    """Whether it is a folder of this kind, here or (`hf://owner/name`) on the Hub, which is then asked.

    Args:
        hub: revision, cache_dir, token, local_files_only, as in `Pretrained.from_pretrained`.

    Raises:
        UserError: the Hub cannot be reached, or has no such repository.
    """
    if str(path_or_hub_id).startswith(HUB):
        return (fetch(path_or_hub_id, files=[INDEX], **hub) / INDEX).is_file()
    return (Path(path_or_hub_id).expanduser() / INDEX).is_file()


def save_exported_refiner(
    folder: str | Path,
    *,
    refiner: ClassRefiner | TextRefiner,
    tokenizer: HBQTokenizer,
    labeling: Labeling,
    sampler: Sampler,
    provenance: Mapping[str, Mapping[str, Any]],
    text: TextSide | None = None,
) -> Path:
    """Writes such a folder: all of it or nothing, and always to the same bytes.

    Args:
        folder: a new or an empty one, or an earlier one of this kind, which is replaced.
        provenance: of `refiner`, `tokenizer` and a `text_encoder` with weights, as in `Pretrained.save_pretrained`.
        text: of a `TextRefiner`.

    Returns:
        `folder`.

    Raises:
        UserError: `folder` holds something else; a schedule or text encoder of a kind that could not be read again, or
            more prompts than an index has room for.
    """
    folder = Path(folder).expanduser()
    _check_replaceable(folder)
    networks: dict[str, Any] = {"refiner": refiner, "tokenizer": tokenizer}
    networks |= {} if text is None else {"text_encoder": text.encoder}
    index = marks(PIPELINE) | {part: _name(type(network)) for part, network in networks.items()}
    index |= {"labeling": labeling, "sampler": _plain(sampler)}
    if text is not None:
        index |= {"prompts": list(text.prompts), "negative_prompt": text.negative_prompt, "size": list(text.size)}
        index |= {"frames": text.frames, "context_latents": text.context_latents}
        index |= {"prompt_prefix": text.prompt_prefix, "prompt_suffix": text.prompt_suffix}
        index |= {"context_prefix": text.context_prefix}
        if len(json.dumps(index, indent=2)) >= MAX_CONFIG_BYTES:
            raise UserError(f"prompts: {len(text.prompts)} of them are too long for {INDEX}; give fewer: prompts=[...]")
    # What could not be read again: an encoder of somebody's own, or a network that is not `Pretrained`.
    _classes(index, folder / INDEX)
    sampler_from_plain(index["sampler"], folder / INDEX)

    def write(temporary: Path) -> None:
        write_json(temporary / INDEX, index)
        for part, network in networks.items():
            if isinstance(network, PretrainedT5):
                (temporary / part).mkdir()
                write_json(temporary / part / CONFIG, marks(PretrainedT5.__name__) | network.reference)
            else:
                network.save_pretrained(temporary / part, provenance=provenance.get(part))

    return write_folder(folder, write)


def load_exported_refiner(path_or_hub_id: str | Path, **hub: Any) -> ExportedRefiner:
    """What `save_exported_refiner` wrote; from the Hub as `hf://owner/name`, `hub` as in `is_exported_refiner`.

    Raises:
        UserError: not there, not whole, or its values are none; nothing in it is executed.
    """
    folder = fetch(path_or_hub_id, files=(*FILES, *TEXT_FILES), **hub)
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder} has no {INDEX}: it is not an exported refiner; python -m grn.export writes one")
    index = read_marked_json(path)
    if index["_class_name"] != PIPELINE:
        raise UserError(f"{path} is of a {brief(index['_class_name'])}, not of a {PIPELINE}")
    classes = _classes(index, path)
    if index.get("labeling") not in get_args(Labeling):
        raise UserError(f"{path}: labeling is {brief(index.get('labeling'))}, not {' or '.join(get_args(Labeling))}")
    provenance = {part: read_config(folder / part)["_provenance"] for part in classes}
    step = provenance["refiner"].get("step")
    return ExportedRefiner(
        folder=folder,
        sampler=sampler_from_plain(index.get("sampler"), path),
        labeling=index["labeling"],
        text=_text_side(index, classes["text_encoder"], folder) if "text_encoder" in classes else None,
        refiner=classes["refiner"].from_pretrained(folder / "refiner"),
        tokenizer=HBQTokenizer.from_pretrained(folder / "tokenizer"),
        step=step if isinstance(step, int) else None,
        provenance=provenance,
    )


def _classes(index: Mapping[str, Any], path: Path) -> dict[str, type]:
    """The class of each part that an index names; that its folder is of this class is for that class to find."""
    classes = {}
    for part, known in PARTS.items():
        if part == "text_encoder" and not issubclass(classes["refiner"], TextRefiner):
            continue
        found = [kind for kind in known if index.get(part) == ["grn", kind.__name__]]
        if not found and part == "refiner":
            found = _own(index.get(part), Pretrained, f"{path}: {part}")
        if not found:
            names = " or a ".join(kind.__name__ for kind in known)
            raise UserError(f"{path}: {part} is {brief(index.get(part))}, this GRN reads a {names} only")
        classes[part] = found[0]
    return classes


def _name(kind: type) -> list[str]:
    """[Library or module, name] of a class, as an index has it."""
    return ["grn" if kind.__module__.startswith("grn.") else kind.__module__, kind.__qualname__]


def _own(name: Any, base: type, complaint: str) -> list[type]:
    """The class of another package that a file names by [module, name]; none of what is no such name, or is of GRN.

    Raises:
        UserError: its package is not trusted or not there, or it is no such class.
    """
    if not isinstance(name, list) or [type(part) for part in name] != [str, str] or name[0].split(".")[0] == "grn":
        return []
    package, full = name[0].split(".")[0], ".".join(name)
    if not re.fullmatch(r"[A-Za-z_][\w.]*", full):
        return []
    if package not in trusted():
        raise UserError(
            f"{complaint} is {brief(full)}, which is no part of GRN; if you trust it, set GRN_TRUST={package}"
        )
    try:
        kind = get_object(full)
    except Exception as error:  # whatever a module raises when it is imported
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{complaint} is {brief(full)}, which cannot be imported: {reason[:200]}") from None
    if not isinstance(kind, type) or not issubclass(kind, base):
        raise UserError(f"{complaint}: {full} must be a class derived from {base.__module__}.{base.__qualname__}")
    return [kind]


def _text_side(index: Mapping[str, Any], encoder: type[ByteT5] | type[PretrainedT5], folder: Path) -> TextSide:
    """Of an index, and a folder, that may hold anything."""
    told: dict[str, Any] = {
        name: index.get(name) for name in ("prompts", "negative_prompt", "size", "frames", "context_latents")
    }
    prompts, negative_prompt, size, frames, context_latents = told.values()
    sound = {
        "prompts": isinstance(prompts, list) and prompts and all(isinstance(prompt, str) for prompt in prompts),
        "negative_prompt": isinstance(negative_prompt, str),
        "size": isinstance(size, list) and [type(side) for side in size] == [int, int] and max(size) <= MAX_SIDE,
        "frames": type(frames) is int and 1 <= frames <= MAX_SIDE,
        "context_latents": type(context_latents) is int and 0 <= context_latents <= MAX_SIDE,
    }
    around = {name: index.get(name, "") for name in ("prompt_prefix", "prompt_suffix")}  # exports had none before
    sound |= {name: isinstance(value, str) for name, value in around.items()}
    around["context_prefix"] = index.get("context_prefix")
    sound["context_prefix"] = isinstance(around["context_prefix"], str | None)
    told |= around
    for name, value in told.items():
        if not sound[name]:
            raise UserError(f"{folder / INDEX}: {name} cannot be {brief(value)}")
    place = folder / "text_encoder"
    made = ByteT5.from_pretrained(place) if encoder is ByteT5 else _referred(place)
    return TextSide(made, prompts, negative_prompt, tuple(size), frames, context_latents, **around)


def _referred(place: Path) -> PretrainedT5:
    config, path = read_config(place), place / CONFIG
    if config["_class_name"] != PretrainedT5.__name__:
        raise UserError(f"{path} is of a {brief(config['_class_name'])}, not of a {PretrainedT5.__name__}")
    reference: dict[str, Any] = {"clean_captions": False}  # of exports from before there was a choice
    reference |= {name: value for name, value in config.items() if not name.startswith("_")}
    texts = {name: value for name, value in reference.items() if name not in ("max_length", "clean_captions")}
    odd = reference.keys() ^ {"path", "weights", "tokenizer", "dtype", "max_length", "clean_captions"}
    odd |= {name for name, value in texts.items() if not isinstance(value, str if name == "path" else (str, NoneType))}
    if odd:
        raise UserError(f"{path} refers to no {PretrainedT5.__name__}: {brief(min(odd))} is odd or missing")
    try:
        return PretrainedT5(**reference)
    except UserError as error:
        raise UserError(f"{path}, which may be edited, refers to something missing: {error}") from None


def _check_replaceable(folder: Path) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        check_replaceable(folder)
        return
    foreign = sorted({entry.name for entry in folder.iterdir()} - {INDEX, CARD, PICTURE, *PARTS})
    if foreign or not (folder / INDEX).is_file() or read_marked_json(folder / INDEX)["_class_name"] != PIPELINE:
        raise UserError(f"{folder} holds other files ({(foreign or ['not from here'])[0]}): choose a new folder")
    for part in PARTS:
        check_replaceable(folder / part)


def _plain(sampler: Sampler) -> dict[str, Any]:
    """A sampler as JSON holds it."""
    schedule = {name: value for name, value in vars(sampler.schedule).items() if value is not None}
    library, name = _name(type(sampler.schedule))
    name = name if library == "grn" else f"{library}.{name}"
    return vars(sampler) | {"schedule": {"_class_name": name, **schedule}}


def sampler_from_plain(values: Any, path: Path) -> Sampler:
    """What `_plain` made, of any values that a file may hold; what is left out has its default."""
    values = dict(values) if isinstance(values, dict) else {}
    schedule = values.pop("schedule", None)
    name = schedule.get("_class_name") if isinstance(schedule, dict) else None
    kind: type[Schedule] | None = SCHEDULES.get(name) if isinstance(name, str) else None
    if kind is None and isinstance(name, str) and "." in name:
        (kind,) = _own(name.rsplit(".", 1), object, f"{path}: sampler.schedule") or [None]
    if kind is None or not is_dataclass(kind):
        raise UserError(f"{path}: sampler.schedule is {brief(name)}, not one of {', '.join(SCHEDULES)}")
    schedule = {key: value for key, value in schedule.items() if key != "_class_name"}
    for where, known, given in (("sampler.schedule", kind, schedule), ("sampler", Sampler, values)):
        defaults = {field.name: field.default for field in fields(known) if field.default not in (None, MISSING)}
        for key, value in given.items():
            if key not in defaults:
                raise UserError(f"{path}: nothing here knows {where}.{brief(key)}; use a later GRN")
            if not _is_like(defaults[key], value):
                raise UserError(f"{path}: {where}.{key} cannot be {brief(value)}")
    try:
        return Sampler(schedule=kind(**schedule), **values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _is_like(default: int | float | str | tuple, value: Any) -> bool:
    """Whether a setting with this default can be `value`, and is nothing that only looks like a number."""
    if isinstance(default, str):
        return isinstance(value, str)
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and len(value) == len(default) and all(map(_is_like, default, value))
    if isinstance(default, int):
        return type(value) is int and abs(value) <= MAX_STEPS
    return type(value) in (int, float) and abs(value) <= MAX_NUMBER
