"""Suites of prompts, as benchmarks have them: read, drawn a fixed number of times each, and laid out for their scorers.

A suite is an option of the config group `suite`: prompts, samples a prompt, layout, scorer.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from grn.media import pictures
from grn.media.mp4 import save_mp4
from grn.runtime.configs import plain
from grn.runtime.errors import UserError, check_count
from grn.runtime.files import sha256_of, write_text
from grn.sampling.generation import Batch

MAX_BYTES, MAX_PROMPTS = 2**24, 100_000
MAX_NAME = 240  # bytes of a file name


@dataclass(frozen=True)
class Suite:
    """prompts: as the suite has them; drawn: as they are drawn, rewritten where that was asked for; lines: what a JSON
    file says of each, with its prompt; stems: names of the prompts' own files, where each has one; record: for
    `metrics.json`. Sample i is of prompt i modulo their number."""

    name: str
    prompts: tuple[str, ...]
    drawn: tuple[str, ...]
    lines: tuple[dict[str, Any], ...]
    stems: tuple[str, ...] | None
    samples: int
    record: dict[str, Any]

    @property
    def num(self) -> int:
        """How many samples there are."""
        return len(self.prompts) * self.samples


def read_suite(config: DictConfig) -> Suite | None:
    """The suite that `suite=...` names; None of `suite=none`.

    Raises:
        UserError: naming the key: no prompts there, or not as many rewritten ones.
    """
    if config.name is None:
        return None
    check_count("suite.samples", config.samples)
    place = Path(config.prompts).expanduser()
    stems = None
    if place.is_dir():  # a file a prompt
        files = sorted(place.glob("*.txt"))
        lines = [{"prompt": " ".join(_read("suite.prompts", file).split())} for file in files]
        stems = tuple(file.stem for file in files)
        digest = hashlib.sha256(json.dumps([stems, [line["prompt"] for line in lines]]).encode()).hexdigest()
    else:
        text = _read("suite.prompts", place, config.get("source"))
        rows = [(number, row) for number, row in enumerate(text.splitlines(), 1) if row.strip()]
        lines = [_line(number, row) if place.suffix == ".jsonl" else {"prompt": row.strip()} for number, row in rows]
        digest = sha256_of(place)
    if not 0 < len(lines) <= MAX_PROMPTS:
        raise UserError(f"suite.prompts: {place} has {len(lines)} prompts; 1 to {MAX_PROMPTS} can be drawn")
    prompts = tuple(line["prompt"] for line in lines)
    record = {"name": config.name, "prompts_sha256": digest, "prompts": len(prompts), "samples": config.samples}
    drawn, record["rewritten_sha256"] = prompts, None
    if config.rewritten is not None:
        path = Path(config.rewritten).expanduser()
        drawn = tuple(row.strip() for row in _read("suite.rewritten", path).splitlines() if row.strip())
        if len(drawn) != len(prompts):
            raise UserError(
                f"suite.rewritten: {path} has {len(drawn)} prompts, one is needed for each of {len(prompts)}"
            )
        record["rewritten_sha256"] = sha256_of(path)
    return Suite(config.name, prompts, drawn, tuple(lines), stems, config.samples, record)


def _read(key: str, path: Path, source: str | None = None) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError:
        hint = "" if source is None else f"; it is {source}"
        raise UserError(f"{key}: there is no file {path}{hint}") from None
    except UnicodeDecodeError:
        raise UserError(f"{key}: {path} is no UTF-8 text") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{key}: {path} has more than {MAX_BYTES // 2**20} MiB")
    return text


def _line(number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict) or not isinstance(line.get("prompt"), str) or not line["prompt"].strip():
        raise UserError(f"suite.prompts: line {number} is no JSON object with a prompt")
    return line


def with_lines(partials: Mapping[str, Any], suite: Suite) -> dict[str, Any]:
    """Scores of a suite that read its lines get them as `asked`."""
    return {
        name: partial(score, asked=suite.lines) if getattr(score.func, "reads_lines", False) else score
        for name, score in partials.items()
    }


class Layout:
    """Writes samples into `folder` as a benchmark's own scorer reads them.

    - `geneval`: `00000/metadata.jsonl` and `00000/samples/0000.png`.
    - `dpg_bench`: `<name of the prompt's file>.png`, a grid of four samples.
    - `t2i_compbench`: `samples/<prompt>_000000.png`, numbered throughout, the samples of a prompt one after the other.
    - `vbench`: `<prompt>-0.mp4`.

    Args:
        kind: one of these.

    Raises:
        UserError: another kind, clips where images are wanted or the other way round, a prompt that cannot be the name
            of a file, or samples that fill no grid.
    """

    def __init__(self, kind: str, suite: Suite, folder: Path, *, clips: bool, fps: float = 16.0):
        if kind not in KINDS:
            raise UserError(f"suite.kind={kind}: choose among {', '.join(KINDS)}")
        if clips != (kind == "vbench"):
            raise UserError(f"suite.kind={kind} is of {'images' if clips else 'clips'}, this refiner's samples are not")
        if kind == "dpg_bench" and suite.samples != 4:
            raise UserError(f"suite.samples={suite.samples}: the grids of suite.kind=dpg_bench have 4")
        if kind in ("t2i_compbench", "vbench"):
            for prompt in suite.prompts:
                if "/" in prompt or not prompt.isprintable() or len(prompt.encode()) > MAX_NAME:
                    raise UserError(f"suite.kind={kind} names files by prompts, which {prompt[:80]!r} cannot be")
        self.kind, self.suite, self.folder, self.fps = kind, suite, folder, fps

    def add(self, batch: Batch) -> None:
        """Writes the samples of a batch; ranks add theirs in any order."""
        for row, number in enumerate(batch.ids.tolist()):
            sample, prompt = divmod(number, len(self.suite.prompts))
            path = self.folder / KINDS[self.kind](self.suite, prompt, sample)
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.kind == "vbench":
                save_mp4(batch.pixels[row].unbind(dim=1), path, fps=self.fps)
                continue
            pictures.save(pictures.single(batch.images[row]), path)
            if self.kind == "geneval" and sample == 0:
                write_text(path.parents[1] / "metadata.jsonl", json.dumps(self.suite.lines[prompt]))

    def finish(self) -> None:
        """What takes all samples: of one process, after all of them have added theirs."""
        if self.kind != "dpg_bench":
            return
        for prompt in range(len(self.suite.prompts)):
            tiles = []
            for sample in range(4):
                with Image.open(self.folder / _dpg_part(self.suite, prompt, sample)) as picture:
                    tiles.append(picture.convert("RGB"))
            width, height = tiles[0].size
            grid = Image.new("RGB", (2 * width, 2 * height))
            for number, tile in enumerate(tiles):
                grid.paste(tile, (number % 2 * width, number // 2 * height))
            pictures.save(grid, self.folder / f"{_dpg_name(self.suite, prompt)}.png")
        shutil.rmtree(self.folder / PARTS)


PARTS = ".samples"


def _dpg_name(suite: Suite, prompt: int) -> str:
    return f"{prompt:05d}" if suite.stems is None else suite.stems[prompt]


def _dpg_part(suite: Suite, prompt: int, sample: int) -> str:
    return f"{PARTS}/{prompt:05d}-{sample}.png"


KINDS: dict[str, Callable[[Suite, int, int], str]] = {
    "geneval": lambda suite, prompt, sample: f"{prompt:05d}/samples/{sample:04d}.png",
    "dpg_bench": _dpg_part,
    "t2i_compbench": lambda suite, prompt, sample: (
        f"samples/{suite.prompts[prompt]}_{prompt * suite.samples + sample:06d}.png"
    ),
    "vbench": lambda suite, prompt, sample: f"{suite.prompts[prompt]}-{sample}.mp4",
}


def scorer(config: DictConfig) -> DictConfig:
    """The scores that a suite is scored by, as a `scores` config."""
    return OmegaConf.create(plain(config.scorer, resolve=True) if config.get("scorer") else {})
