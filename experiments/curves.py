"""Loss curves and step times of digits_c2i on the working tree and on another commit: `make curves BASE=main`.

Each side prepares its own data, trains a tokenizer for half as many steps and then the refiner, with the same seed and
on one thread, so that the code is all that differs. Results: build/curves/curves.png and curves.json.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "curves"
BATCH = 64  # images a step of digits_c2i
# `python -m grn.<verb>` of each stage, one after the other, so that a side imports everything once.
ONE_PROCESS = """
import json, runpy, sys
for verb, *arguments in json.loads(sys.argv[1]):
    sys.argv = ["grn." + verb, *arguments]
    runpy.run_module("grn." + verb, run_name="__main__")
"""


def stages(steps: int) -> list[list[str]]:
    """The commands of one side: a verb and its arguments."""
    shared = ["logger=csv", "scores=none", "trainer.limit_val_batches=0", "trainer.log_every_n_steps=5"]
    shared += ["callbacks.grid=null"]
    half = max(1, steps // 2)
    return [
        ["prepare", "data=digits"],
        ["train", "+experiment=digits_tokenizer", *shared, f"trainer.max_steps={half}", "training.warmup_steps=0"],
        ["train", "+experiment=digits_c2i", *shared, "callbacks.film=null", f"trainer.max_steps={steps}",
         f"training.warmup_steps={half}"],
    ]  # fmt: skip


def train(tree: Path, folder: Path, steps: int) -> dict[str, list]:
    """Runs the commands with the code of `tree`, in `folder`; the curves of the refiner."""
    environment = {
        **os.environ,
        "GRN_DATA": str(folder / "data"),
        "GRN_RUNS": str(folder / "runs"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(tree),
    }
    print(f"{tree}:", *(" ".join(["grn", *stage]) for stage in stages(steps)), sep="\n  ", flush=True)
    subprocess.run(
        [sys.executable, "-c", ONE_PROCESS, json.dumps(stages(steps))], cwd=tree, env=environment, check=True
    )
    (path,) = (folder / "runs" / "digits_c2i" / "csv").rglob("metrics.csv")
    return curves(path)


def curves(path: Path) -> dict[str, list]:
    """Of metrics.csv: (step, training loss), and the seconds a step of each logged interval but the first."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    loss = [(int(row["step"]), float(row["train/loss"])) for row in rows if row.get("train/loss")]
    rates = [float(row["train/images_per_second"]) for row in rows if row.get("train/images_per_second")]
    return {"loss": loss, "seconds": [BATCH / rate for rate in rates[1:] or rates]}


def draw(sides: dict[str, dict[str, list]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", width_ratios=(2, 1))
    for name, side in sides.items():
        left.plot(*zip(*side["loss"]), lw=1, label=name)
    right.boxplot([side["seconds"] for side in sides.values()], tick_labels=list(sides), showfliers=False)
    left.set(xlabel="step", ylabel="training loss, nats a token")
    right.set(ylabel="seconds a step")
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="a commit, branch or tag")
    parser.add_argument("--steps", type=int, default=200, help="of the refiner; default: 200")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    commit = git("rev-parse", "--short", "--verify", f"{asked.base}^{{commit}}")
    with tempfile.TemporaryDirectory() as scratch:
        tree, sides = Path(scratch, "base"), {}
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            for name, code in ((commit, tree), ("working tree", ROOT)):
                sides[name] = train(code, Path(scratch, name.replace(" ", "_") + "_runs"), asked.steps)
        finally:
            git("worktree", "remove", "--force", str(tree))
    asked.out.mkdir(parents=True, exist_ok=True)
    draw(sides, asked.out / "curves.png")
    (asked.out / "curves.json").write_text(json.dumps(sides, indent=1), encoding="utf-8")
    for name, side in sides.items():
        last = statistics.fmean(loss for _, loss in side["loss"][-5:])
        step = 1000 * statistics.median(side["seconds"])
        print(f"{name}: loss {last:.4f} (mean of the last five), {step:.1f} ms a step")
    print(asked.out / "curves.png")


if __name__ == "__main__":
    main()
