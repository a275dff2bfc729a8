"""python -m grn.demo: the whole method on handwritten digits, from the data to scored samples; what `make demo` does.

The same as its six commands one after the other (`STAGES`), in one process. What was done before is not done again.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table


class Stage(NamedTuple):
    heading: str
    verb: str
    arguments: tuple[str, ...]


RUNS = os.environ.get("GRN_RUNS", "runs")
TOKENIZER, REFINER = f"{RUNS}/digits_tokenizer", f"{RUNS}/digits_c2i"
STAGES = (
    Stage("Prepare 1797 handwritten digits", "prepare", ("data=digits",)),
    Stage("Train a tokenizer", "train", ("+experiment=digits_tokenizer", "ckpt_path=auto")),
    Stage("Train a refiner on its tokens", "train", ("+experiment=digits_c2i", "ckpt_path=auto")),
    Stage("Sample: 40 digits, and how they come about", "sample", (f"ckpt={REFINER}",)),
    Stage("Score the tokenizer on held-out digits", "evaluate", (f"ckpt={TOKENIZER}",)),
    Stage("Score 1000 samples of the refiner", "evaluate", (f"ckpt={REFINER}",)),
)

# (What the box says, whose metrics, which, its format, the same of real held-out digits)
NUMBERS = (
    ("tokenizer: PSNR of held-out digits", TOKENIZER, "psnr", "{:.1f} dB", None),
    ("samples read as the asked-for digit", REFINER, "judge_accuracy", "{:.1%}", "judge_val_accuracy"),
    ("FID to the training digits", REFINER, "fid", "{:.1f}", "fid_val"),
    ("distance to the nearest training digit", REFINER, "nn_median_generated", "{:.3f}", "nn_median_val"),
    ("refinement steps a sample", REFINER, "steps_mean", "{:.1f}", None),
)
PICTURES = (
    (f"{REFINER}/evaluation/samples.png", "a hundred samples, a class a column"),
    (f"{REFINER}/samples/refinement.gif", "the refinement, step by step"),
    (f"{REFINER}/evaluation/nearest.png", "samples above the training digits nearest to them"),
    (f"{TOKENIZER}/pictures", "held-out digits above their reconstructions"),
)
NEXT = (
    f"python -m grn.studio ckpt={REFINER}",
    f"python -m grn.sample ckpt={REFINER} labels=[3,7] num=16 seed=1",
    f"python -m grn.evaluate ckpt={REFINER} sampler=linear out={RUNS}/linear",
    "python -m grn.train +experiment=digits_c2i model.depth=2 name=shallow",
)


def main() -> None:
    """Runs the stages; a mistake, or a signal, ends the demo with the stage's own line and exit status."""
    if sys.argv[1:]:
        if sys.argv[1] in ("-h", "--help"):
            print(__doc__)
            return
        sys.exit(f"error: {sys.argv[1]}: the demo takes no arguments")
    os.environ.setdefault("WANDB_SILENT", "true")  # its runs are kept, offline unless somebody is logged in
    console, started = Console(), time.perf_counter()
    for number, stage in enumerate(STAGES, 1):
        console.print()
        console.rule(f"[bold]{number}/{len(STAGES)}  {stage.heading}", align="left")
        console.print(f"python -m grn.{stage.verb} {' '.join(stage.arguments)}", style="dim", highlight=False)
        sys.argv[1:] = stage.arguments
        importlib.import_module(f"grn.{stage.verb}").main()
    console.print()
    console.print(_box(time.perf_counter() - started))


def _box(seconds: float) -> Panel:
    numbers = Table(box=None, pad_edge=False)
    numbers.add_column("measured")
    numbers.add_column("", justify="right", style="bold")
    numbers.add_column("real digits", justify="right")
    for what, run, name, form, real in NUMBERS:
        metrics = _metrics(run)
        numbers.add_row(what, form.format(metrics[name]), form.format(metrics[real]) if real else "")
    pictures = Table(box=None, pad_edge=False)
    pictures.add_column("pictures", no_wrap=True)
    pictures.add_column("")
    for path, what in PICTURES:
        pictures.add_row(path, what)
    further = Table(box=None, pad_edge=False)
    further.add_column("what to try next", overflow="fold")
    for command in NEXT:
        further.add_row(command)
    title = f"the demo took {seconds / 60:.1f} minutes"
    return Panel(Group(numbers, "", pictures, "", further), title=title, expand=False)


def _metrics(run: str) -> dict[str, Any]:
    return json.loads((Path(run) / "evaluation" / "metrics.json").read_text(encoding="utf-8"))["metrics"]


if __name__ == "__main__":
    main()
