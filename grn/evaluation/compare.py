"""What tells evaluations apart, settings, metrics and same-seed samples: what `grn compare A B` prints and writes.

Results may be somebody else's: reads are bounded, and what is damaged ends in one line.
"""

import base64
import html
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig
from PIL import Image
from rich.markup import escape
from rich.table import Table

from grn.runs.listing import MAX_METRICS, MAX_PICTURE, read_config
from grn.runtime.errors import UserError, check_count
from grn.runtime.files import read_bounded, write_text
from grn.runtime.tables import show

SPREAD = {"isc_mean": "isc_std", "kid_mean": "kid_std"}  # what papers write behind these
BESIDE = ("settings", "provenance", "uncertainty", "metrics", "shown", "steps_histogram", "steps_by_class", "sampler")
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>GRN: evaluations compared</title>
<style>body{{font:14px system-ui,sans-serif;margin:2em;color:#222;background:#fff}}table{{border-collapse:collapse}}
td,th{{border-bottom:1px solid #ddd;padding:.3em .8em;text-align:left;overflow-wrap:anywhere;max-width:30em}}
img{{image-rendering:pixelated;min-width:64px;vertical-align:top}}
.samples td,.samples th{{padding:2px;border:0}}</style>
<h1>Evaluations compared</h1>{body}</html>
"""


class Result(NamedTuple):
    """One evaluation: its folder, what it was of and how (dotted keys), its metrics, and their uncertainty."""

    folder: Path
    settings: dict[str, Any]
    metrics: dict[str, float]
    uncertainty: dict[str, float]
    shown: dict[str, int]


def compare(config: DictConfig) -> Path:
    """Prints what differs among `results` and writes `compare.html` into `out`; returns that file.

    Raises:
        UserError: fewer than two results, or one that cannot be read.
    """
    check_count("samples", config.samples, least=0)
    if isinstance(config.results, str) or len(config.results) < 2:
        raise UserError(f"results={config.results}: at least two folders of results, grn compare A B")
    results = [read_result(place) for place in config.results]
    tables = [
        ("settings that differ", *differences(results)),
        ("metrics", *measured(results)),
    ]
    for title, heads, rows in tables:
        if not rows:
            print(f"{title}: none")
            continue
        printed = Table(title=title)
        for number, head in enumerate(heads):
            printed.add_column(escape(head), overflow="fold", no_wrap=number == 0)
        for row in rows:
            printed.add_row(*map(escape, row))
        show(printed)
    path = write_text(Path(config.out) / "compare.html", _page(tables, results, config.samples))
    print(f"written: {path}")
    return path


def read_result(place: str) -> Result:
    """Of a folder with `metrics.json`, that file, or a run folder with `evaluation/metrics.json`.

    Raises:
        UserError: nothing of that kind is there, or it is damaged.
    """
    path = Path(place).expanduser()
    candidates = [path] if path.suffix == ".json" else [path / "evaluation" / "metrics.json", path / "metrics.json"]
    found = next((it for it in candidates if it.is_file()), None)
    if found is None:
        raise UserError(f"results: {place} has no metrics.json: python -m grn.evaluate ckpt=... out={place} writes one")
    try:
        content = json.loads(read_bounded(found, MAX_METRICS, follow=False))
        metrics = {str(name): float(value) for name, value in content["metrics"].items()}
        uncertainty = {str(name): float(value) for name, value in content.get("uncertainty", {}).items()}
        beside = {key: value for key, value in content.items() if key not in BESIDE}
        settings = content.get("settings", {"sampler": content.get("sampler")})
        told = flat({**beside, **settings, **content.get("provenance", {}), "run": _run(content.get("ckpt"))})
        shown = {str(key): int(value) for key, value in content.get("shown", {}).items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(
            f"results: {found} is damaged ({type(error).__name__}): grn.evaluate measures it again"
        ) from None
    uncertainty |= {name: metrics[spread] for name, spread in SPREAD.items() if name in metrics and spread in metrics}
    return Result(found.parent, told, metrics, uncertainty, shown)


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """The values of plain containers by dotted keys; lists count as values."""
    if not isinstance(node, dict):
        return {key: node}
    return {name: value for k, v in node.items() for name, value in flat(v, f"{key}.{k}" if key else str(k)).items()}


def differences(results: list[Result]) -> tuple[list[str], list[list[str]]]:
    """(Heads, rows) of the settings that are not the same everywhere."""
    keys = dict.fromkeys(key for result in results for key in result.settings)
    rows = []
    for key in keys:
        values = [_text(result.settings.get(key, "—")) for result in results]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return ["", *(str(result.folder) for result in results)], rows


def measured(results: list[Result]) -> tuple[list[str], list[list[str]]]:
    """(Heads, rows) of all metrics with their uncertainty."""
    keys = dict.fromkeys(key for result in results for key in result.metrics)
    rows = []
    for key in keys:
        values = []
        for result in results:
            value, spread = result.metrics.get(key), result.uncertainty.get(key)
            values.append("—" if value is None else f"{value:.6g}" + ("" if spread is None else f" ± {spread:.2g}"))
        rows.append([key, *values])
    return ["", *(str(result.folder) for result in results)], rows


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:199]}…"


def _run(ckpt: Any) -> dict[str, Any]:
    """The config of the run that a checkpoint file lies in; {} where there is none."""
    if not isinstance(ckpt, str):
        return {}
    try:
        return read_config(Path(ckpt).parent.parent / "config.yaml")
    except ValueError:
        return {}


def _page(tables: list[tuple[str, list[str], list[list[str]]]], results: list[Result], count: int) -> str:
    body = []
    for title, heads, rows in tables:
        body.append(f"<h2>{html.escape(title)}</h2>{_table([heads, *rows])}")
    pictures = [_samples(result, count) for result in results]
    count = min(map(len, pictures))
    if count:
        seeds = {str(result.settings.get("seed")) for result in results}
        same = (
            f"seed {html.escape(seeds.pop())}" if len(seeds) == 1 else "seeds differ, so these start from other noise"
        )
        names = "".join(
            f"<tr><th>{html.escape(str(r.folder))}</th>{_cells(p[:count])}</tr>" for r, p in zip(results, pictures)
        )
        numbers = "".join(f"<th>{number}</th>" for number in range(count))
        body.append(f"<h2>Samples ({same})</h2><table class=samples><tr><th></th>{numbers}</tr>{names}</table>")
    return PAGE.format(body="".join(body))


def _table(rows: list[list[str]]) -> str:
    heads, *rest = ([html.escape(cell) for cell in row] for row in rows)
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rest)
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{cells}</table>"


def _cells(pictures: list[str]) -> str:
    return "".join(f'<td><img alt="" src="data:image/png;base64,{picture}"></td>' for picture in pictures)


def _samples(result: Result, count: int) -> list[str]:
    """The first samples, cut out of `samples.png`, as PNGs in base64; [] where there are none."""
    path, shown = result.folder / "samples.png", result.shown
    try:
        number, columns, height, width, scale = (shown[key] for key in ("count", "columns", "height", "width", "scale"))
        if min(number, columns, height, width, scale) < 1 or path.stat().st_size > MAX_PICTURE or path.is_symlink():
            return []
        columns = min(columns, number)
        with Image.open(path, formats=["PNG"]) as opened:
            size = (2 + columns * (width + 2), 2 + math.ceil(number / columns) * (height + 2))
            if opened.size != (size[0] * scale, size[1] * scale):
                return []
            grid = opened.convert("RGB")
    except (KeyError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return []
    found = []
    for place in range(min(count, number)):
        left, top = 2 + place % columns * (width + 2), 2 + place // columns * (height + 2)
        box = scale * left, scale * top, scale * (left + width), scale * (top + height)
        data = io.BytesIO()
        grid.crop(box).resize((width, height), Image.Resampling.NEAREST).save(data, "PNG")
        found.append(base64.b64encode(data.getvalue()).decode())
    return found
