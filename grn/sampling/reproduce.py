"""Reproduces a request: as a command, as Python, with files of its start and of its erasures."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from grn.method.sampler import Sampler
from grn.method.schedules import Cosine, EntropyGuided, Linear, Shifted
from grn.runtime.errors import UserError
from grn.runtime.files import read_bounded, write_atomically, write_json
from grn.runtime.overrides import quote
from grn.sampling.refinement import Erasure, Start
from grn.sampling.request import CompleteRequest

OPTIONS = {Linear: "linear", Cosine: "cosine", Shifted: "shifted", EntropyGuided: "entropy"}  # of the group `sampler`
MAX_BYTES = 1 << 24
MAX_START = 1 << 28


def as_command(ckpt: str, request: CompleteRequest, extra: Mapping[str, Any] | None = None) -> str:
    """`grn sample ...`, as a shell takes it, of a request.

    Args:
        extra: keys of the command that are no part of a request: init, mask, strength, erasures, ...
    """
    given: dict[str, Any] = {"ckpt": ckpt}
    if request.prompts is None:
        given["labels"] = list(request.wanted)
    else:
        given["prompts"] = [quote(prompt, "text") for prompt in request.prompts]
        given |= {"negative_prompt": quote(request.negative_prompt, "text")} if request.negative_prompt else {}
        given |= {"height": request.height, "width": request.width, "frames": request.frames}
    given |= {"num": request.num, "seed": request.seed, **_sampler_keys(request.sampler), **(extra or {})}
    return shlex.join(["grn", "sample", *(f"{key}={_value(value)}" for key, value in given.items())])


def as_python(ckpt: str, request: CompleteRequest, *, start: str | None = None, erasures: str | None = None) -> str:
    """Lines of Python that draw a request with `GRNPipeline`.

    They leave a `PipelineOutput` as `result`, or, with files, a `grn.sampling.generation.Batch` as `batch`.

    Args:
        start, erasures: files of `write_start` and `write_erasures`.
    """
    schedule, sampler = request.sampler.schedule, request.sampler
    settings = ", ".join(f"{name}={value!r}" for name, value in vars(schedule).items() if value is not None)
    what = repr(list(request.wanted))
    arguments = [f"labels={what}"] if request.prompts is None else [what]
    if request.prompts is not None:
        arguments += [f"negative_prompt={request.negative_prompt!r}"] if request.negative_prompt else []
        arguments += [f"height={request.height}", f"width={request.width}", f"num_frames={request.frames}"]
    if each := request.num // len(request.wanted) - 1:
        arguments.append(f"num_images_per_prompt={each + 1}")
    arguments += [
        f"num_inference_steps={type(schedule).__name__}({settings})",
        f"guidance_scale={sampler.guidance!r}",
        f"guidance_interval={tuple(sampler.guidance_interval)!r}",
        f"temperature={sampler.temperature!r}",
        *(f"{name}={value!r}" for name, value in _update(sampler).items()),
        f"seed={request.seed}",
    ]
    files = {"start": start, "erasures": erasures}
    files = {name: path for name, path in files.items() if path is not None}
    call = ",\n    ".join(arguments)
    lines = ["from dataclasses import replace", ""] if files else []
    lines += ["from grn import GRNPipeline", f"from {type(schedule).__module__} import {type(schedule).__name__}"]
    if files:
        lines.append(f"from {__name__} import {', '.join(f'read_{name}' for name in sorted(files))}")
    lines += ["", f"pipe = GRNPipeline.from_pretrained({ckpt!r})"]
    if not files:
        return "\n".join([*lines, f"result = pipe(\n    {call},\n)\n"])
    read = ", ".join(f"{name}=read_{name}({path!r})" for name, path in files.items())
    lines += [f"request = pipe.request(\n    {call},\n)", f"request = replace(request, {read})"]
    return "\n".join([*lines, "(batch,) = pipe.sample(request)", "images = batch.images", ""])


def write_erasures(path: Path, erasures: Sequence[Erasure]) -> Path:
    """Writes what was erased as JSON, atomically: {"sample", "after", "shape", "positions": [[frame, row, column]]}."""
    entries = [
        {
            "sample": erasure.sample,
            "after": erasure.after,
            "shape": list(erasure.positions.shape),
            "positions": erasure.positions.nonzero().tolist(),
        }
        for erasure in erasures
    ]
    return write_json(path, entries)


def read_erasures(path: str | Path) -> tuple[Erasure, ...]:
    """What `write_erasures` wrote.

    Raises:
        UserError: not there, too large, or something else.
    """
    path = Path(path).expanduser()
    try:
        return tuple(_erasure(entry) for entry in json.loads(read_bounded(path, MAX_BYTES)))
    except FileNotFoundError:
        raise UserError(f"erasures={path}: there is no such file") from None
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise UserError(f"erasures={path} is not a file of erasures (write_erasures)") from None


def start_bytes(tokens: Tensor, strength: float = 1.0, redraw: Tensor | None = None) -> bytes:
    """A safetensors file of tokens as of `grn.sampling.refinement.Start`: what `read_start` reads."""
    tensors = {"tokens": tokens.to(torch.uint8).contiguous().cpu()}
    if redraw is not None:
        tensors["redraw"] = redraw.to(torch.uint8).contiguous().cpu()
    return save(tensors, metadata={"strength": repr(strength)})


def write_start(path: Path, start: Start) -> Path:
    """Writes what samples start from, atomically."""
    data = start_bytes(start.tokens, start.strength, start.redraw)
    return write_atomically(path, lambda temporary: temporary.write_bytes(data))


def read_start(path: str | Path, *, strength: float | None = None) -> Start:
    """What `write_start` wrote, on the CPU.

    Args:
        strength: None: the file's own.

    Raises:
        UserError: not there, too large, or something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"start={path}: there is no such file")
    try:
        if path.stat().st_size > MAX_START:
            raise ValueError
        with safe_open(path, "pt") as file:
            own = float((file.metadata() or {}).get("strength", 1.0))
            there = {"tokens", "redraw"}.intersection(file.keys())
            tensors = {name: file.get_tensor(name) for name in there}
        if any(tensor.dtype != torch.uint8 or tensor.ndim != 5 for tensor in tensors.values()):
            raise ValueError
        redraw = tensors.get("redraw")
        start = Start(tensors["tokens"].long(), own if strength is None else strength, redraw)
        return start if redraw is None else replace(start, redraw=redraw > 0)
    except (OSError, ValueError, KeyError, SafetensorError):
        raise UserError(f"start={path} is not a file of tokens to start from (write_start)") from None


def _erasure(entry: Any) -> Erasure:
    frames, rows, columns = entry["shape"]
    numbers = [entry["sample"], entry["after"], frames, rows, columns]
    if not all(type(number) is int and 0 <= number < 2**20 for number in numbers) or frames * rows * columns > 2**22:
        raise ValueError
    positions = torch.zeros(frames, rows, columns, dtype=torch.bool)
    for place in entry["positions"]:
        frame, row, column = place
        if not all(type(number) is int and number >= 0 for number in place):
            raise ValueError
        positions[frame, row, column] = True
    return Erasure(entry["sample"], entry["after"], positions)


def _sampler_keys(sampler: Sampler) -> dict[str, Any]:
    schedule = {name: value for name, value in vars(sampler.schedule).items() if value is not None}
    keys = {"sampler": OPTIONS[type(sampler.schedule)]}
    keys |= {f"sampler.schedule.{name}": value for name, value in schedule.items()}
    return keys | {
        "sampler.temperature": sampler.temperature,
        "sampler.guidance": sampler.guidance,
        "sampler.guidance_interval": list(sampler.guidance_interval),
        **{f"sampler.{name}": value for name, value in _update(sampler).items()},
    }


def _update(sampler: Sampler) -> dict[str, Any]:
    if sampler.update == "redraw":
        return {"update": "redraw"}
    window = list(sampler.kappa_window)
    return {"update": "psi", "kappa": sampler.kappa, "kappa_form": sampler.kappa_form, "kappa_window": window}


def _value(value: Any) -> str:
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
