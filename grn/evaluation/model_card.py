"""The model card of an export: README.md with the metadata that the Hugging Face Hub reads, and its picture."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

import grn
from grn.checkpoints.exported import PARTS
from grn.checkpoints.summary import summary
from grn.metrics.headlines import headlines
from grn.runs.listing import MAX_METRICS, MAX_PICTURE
from grn.runtime.files import Unreadable, read_bounded, write_text
from grn.weights.kinds import CARD, INDEX, PICTURE

PAPER = "https://arxiv.org/abs/2604.13030"


def write_card(folder: Path, *, results: Path, license: str | None = None) -> Path:
    """Writes README.md, and samples.png where there are some, into the folder of an export.

    Args:
        results: the folder of an evaluation; its scores and samples are told where they are of the same step.
        license: as the Hub names it, e.g. `mit`.

    Raises:
        UserError: `folder` is no export.
    """
    export = summary(folder)
    refiner = export.get("refiner")
    step = (refiner or export).get("step")
    if refiner is None:
        task, says = "image-feature-extraction", "An HBQ tokenizer"
    elif refiner["class"] == "TextRefiner":
        task, says = "text-to-video" if export.get("frames", 1) > 1 else "text-to-image", "A text refiner"
    else:
        task, says = "unconditional-image-generation", "A class-conditional refiner"
    found = _results(results, step)
    scores = headlines(found.get("metrics", {}))
    name = folder.resolve().name if folder.name != "export" else folder.resolve().parent.name
    data = ModelCardData(
        library_name="grn",
        license=license,
        pipeline_tag=task,
        tags=["generative-refinement-networks", "arxiv:2604.13030"],
        model_name=name if scores else None,
        eval_results=[_result(metric, found, task) for metric in scores] or None,
    )
    parts = {"": export} if refiner is None else {part: export[part] for part in PARTS if part in export}
    sizes = ", ".join(
        f"{part} {size / 1e6:.2f} M".strip() for part, it in parts.items() if (size := it.get("parameters"))
    )
    about = (
        f"{says} of [Generative Refinement Networks]({PAPER}), written by GRN {grn.__version__}. Parameters: {sizes}."
    )
    lines = [f"# {name}", about + (f" Trained for {step} steps." if step is not None else "")]
    if found and _copy_picture(results / PICTURE, folder / PICTURE):
        lines.append(f"![samples]({PICTURE})")
    lines += ["## Use", f"```python\n{_snippet(folder, task)}\n```"]
    if scores:
        rows = "\n".join(f"| {metric} | {value} |" for metric, value in scores.items())
        lines += ["## Scores", f"| metric | value |\n|---|---|\n{rows}", _settings(found)]
    if license is None:
        lines += ["## License", "Not stated."]
    return write_text(folder / CARD, f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n")


def _results(folder: Path, step: int | None) -> dict[str, Any]:
    """What `metrics.json` says, where it is of that step; {} else."""
    try:
        found = json.loads(read_bounded(folder / "metrics.json", MAX_METRICS, follow=False))
        metrics = {str(name): float(value) for name, value in found["metrics"].items()}
        if found.get("step") != step:
            return {}
    except (FileNotFoundError, Unreadable, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return found | {"metrics": {name: value for name, value in metrics.items() if math.isfinite(value)}}


def _copy_picture(source: Path, target: Path) -> bool:
    if source.is_symlink() or not source.is_file() or not 0 < source.stat().st_size <= MAX_PICTURE:
        return False
    shutil.copyfile(source, target)
    return True


def _result(name: str, found: Mapping[str, Any], task: str) -> EvalResult:
    settings = found.get("settings")
    data = settings.get("data") if isinstance(settings, Mapping) else None
    dataset = str(data.get("name", "not stated")) if isinstance(data, Mapping) else "not stated"
    value = found["metrics"][name]
    return EvalResult(task_type=task, dataset_type=dataset, dataset_name=dataset, metric_type=name, metric_value=value)


def _settings(found: Mapping[str, Any]) -> str:
    told = [f"{name}: {found[name]}" for name in ("num", "seed") if name in found]
    told += [f"sampler: `{found['sampler']}`"] if "sampler" in found else []
    return f"By `grn.evaluate` ({'; '.join(told)})." if told else "By `grn.evaluate`."


def _snippet(folder: Path, task: str) -> str:
    if not (folder / INDEX).is_file():
        return (
            f'from grn.networks.tokenizer import HBQTokenizer\n\ntokenizer = HBQTokenizer.from_pretrained("{folder}")'
        )
    asked = "labels=0" if task == "unconditional-image-generation" else '"what to draw"'
    return (
        f'from grn import GRNPipeline\n\npipe = GRNPipeline.from_pretrained("{folder}")\n'
        f'pipe({asked}, seed=1).images[0].save("sample.png")'
    )
