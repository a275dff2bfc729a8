"""Quality against the mean number of steps, by schedule, and whom entropy calls difficult (README.md beside this file).

    python experiments/entropy_sampling/study.py [CKPT [SAMPLES]]

from where the checkpoint's data are (pip install -e '.[studies]'). What runs/entropy_sampling holds is not measured
again.
"""

import argparse
import logging
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from scipy.stats import spearmanr
from torch import Tensor

import grn.cli.entry  # noqa: F401  its resolvers
from grn.checkpoints.native import read_checkpoint
from grn.evaluation.scoring import build_scores, real_splits, score_samples
from grn.media import pictures
from grn.method.schedules import Cosine, Linear, Schedule
from grn.runtime.files import write_atomically, write_json
from grn.sampling.bundle import RefinerBundle
from grn.sampling.calibration import steps_taken
from grn.sampling.generation import Batch
from grn.sampling.loading import bundle_from_checkpoint
from grn.sampling.request import Request
from grn.studies.plots import log_x
from grn.studies.results import Column, markdown, read_points, write_csv
from grn.studies.schedules import Shuffled, Unscaled, calibrated, warmup_of
from grn.studies.study import folder_of, missing, run_study
from grn.toys.judge import DigitsJudge

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
OUT = folder_of("entropy_sampling")
BATCH = 64
SEED, CALIBRATION_SEED = 1, 2
PLAIN, GUIDED = 1.0, 1.5  # without guidance a sampler's own faults show; 1.5 is what the checkpoint samples with
STEPS = (5, 8, 12, 20, 30, 50)
MAIN, CONTROLS = ("linear", "cosine", "entropy"), ("unscaled", "shuffled")
POINTS = (  # (guidance, schedule, steps)
    *((PLAIN, name, steps) for steps in (5, 8, 12, 20) for name in MAIN),
    *((PLAIN, name, steps) for steps in (8, 12, 20) for name in CONTROLS),
    *((GUIDED, name, 20) for name in MAIN),
    *((PLAIN, name, steps) for steps in (30, 50) for name in MAIN),
    *((GUIDED, name, 8) for name in MAIN),
)
LOOKED_AT = {(GUIDED, "linear", 20), (GUIDED, "entropy", 20)}  # whose samples are kept


def schedule(name: str, steps: int, bundle: RefinerBundle, guidance: float, num: int) -> Schedule:
    """The schedule of a point, calibrated where it looks at entropies."""
    if name in ("linear", "cosine"):
        return Linear(steps) if name == "linear" else Cosine(steps)
    request = Request(num=num, seed=CALIBRATION_SEED)
    guided, entropy = calibrated(steps, bundle, request, guidance, batch_size=BATCH)
    if name == "shuffled":
        return Shuffled(**vars(guided), plans=steps_taken(guided, entropy))
    return Unscaled(**vars(guided)) if name == "unscaled" else guided


def file_of(guidance: float, name: str, steps: int) -> Path:
    return OUT / f"{name}-{steps}-{guidance}.json"


def measure(ckpt: str, num: int) -> None:
    """Leaves `<point>.json` of every point in OUT, and `<point>.pt`, the samples, of those that are looked at."""
    checkpoint = read_checkpoint(ckpt)
    bundle = bundle_from_checkpoint(checkpoint)
    splits = real_splits(instantiate(checkpoint.config.data), clips=False)
    configs = {name: checkpoint.config.scores[name] for name in ("fid", "judge")}
    partials = instantiate(OmegaConf.merge(configs, {"fid": {"isc": False}}))
    scores = build_scores(partials, splits, device=bundle.device, cache_dir=OUT / "cache")
    for point, path in missing(POINTS, file_of):
        guidance, name, steps = point
        batches: list[Batch] = []
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            chosen = schedule(name, steps, bundle, guidance, num // 2)
            sampler = replace(bundle.sampler, schedule=chosen, guidance=guidance)
            metrics, _ = score_samples(
                bundle,
                scores,
                num=num,
                batch_size=BATCH,
                seed=SEED,
                sampler=sampler,
                watch=batches.append if point in LOOKED_AT else None,
            )
        if batches:
            write_atomically(path.with_suffix(".pt"), lambda file, batches=batches: torch.save(_kept(batches), file))
        taken = {"guidance": guidance, "schedule": name, "target": steps, "num": num}
        taken |= {"warmup": getattr(chosen, "warmup", None), "cpu_seconds": time.process_time() - started}
        write_json(path, taken | metrics)
        log.info("%s: judge %.3f, FID %.2f", path.stem, metrics["judge_accuracy"], metrics["fid"])


def _kept(batches: list[Batch]) -> dict[str, Tensor]:
    """images uint8 [N, 3, H, W]; labels, steps int64 [N]; trace float32 [N, steps], in the order of the samples."""
    order = torch.cat([batch.ids for batch in batches]).argsort()
    parts = {
        "images": [batch.images for batch in batches],
        "labels": [batch.labels for batch in batches],
        "steps": [batch.refined.steps for batch in batches],
        "trace": [batch.refined.trace for batch in batches],
    }
    return {name: torch.cat(part)[order] for name, part in parts.items()}


def tabulate() -> pd.DataFrame:
    """Writes results.csv, prints it as a table, and returns it."""
    measured = ("steps_mean", "steps_min", "steps_max", "judge_accuracy", "fid", "num")
    by, order = ("guidance", "target", "schedule"), {"schedule": (*MAIN, *CONTROLS)}
    points = read_points(OUT, by, (*measured, "cpu_seconds"), order=order)
    table = points[["guidance", "schedule", "target", *measured]]
    write_csv(table, HERE / "results.csv", float_format=None)
    print(markdown(table, [Column(name, spec=".4g" if table[name].dtype == float else "") for name in table]))
    print("CPU seconds:", round(points.cpu_seconds.sum()))
    return table


def plot(table: pd.DataFrame) -> None:
    """steps.png: FID and the judge by mean steps."""
    figure = Figure((12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    styles = dict(zip((*MAIN, *CONTROLS), ("o-C0", "s-C2", "D-C3", "D:C1", "x:C4")))
    panels = [(PLAIN, "fid", "FID"), (PLAIN, "judge_accuracy", "judge's accuracy"), (GUIDED, "fid", "FID")]
    for axis, (guidance, key, label) in zip(axes, panels):
        for name, rows in table[table.guidance == guidance].groupby("schedule", sort=False):
            axis.plot("steps_mean", key, styles[name], data=rows, label=name)
        axis.set(xlabel="mean steps", ylabel=label, title=f"guidance {guidance}")
        log_x(axis, STEPS)
    axes[0].legend()
    figure.savefig(HERE / "steps.png", dpi=100)


def look(ckpt: str) -> None:
    """difficulty.png, the easiest and the hardest of each class; and prints what the judge thinks of them."""
    judge = DigitsJudge(**real_splits(instantiate(read_checkpoint(ckpt).config.data)))
    print("guidance, schedule: rank correlation of entropy and the judge's margin, over all and within classes")
    for guidance, name, steps in sorted(LOOKED_AT):
        kept = torch.load(file_of(guidance, name, steps).with_suffix(".pt"), weights_only=True)
        images, labels = kept["images"], kept["labels"]
        entropy = kept["trace"][:, warmup_of(steps)]
        cells = F.adaptive_avg_pool2d(images.float().mean(dim=1, keepdim=True) / 255, 8).flatten(1)
        votes = torch.from_numpy(judge.svc.decision_function(cells.numpy()))
        asked = votes.gather(1, labels[:, None]).squeeze(1)
        margin = asked - votes.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        within = [spearmanr(entropy[labels == c], margin[labels == c])[0] for c in labels.unique()]
        print(f"{guidance}, {name}: {spearmanr(entropy, margin)[0]:.2f}, {sum(within) / len(within):.2f}")
        wrong = (judge.read(images) != labels).double()
        groups = {"fifths of the entropy": entropy.argsort().chunk(5)}
        groups["classes"] = [torch.nonzero(labels == c).squeeze(1) for c in labels.unique()]
        for name_of_groups, members in groups.items():
            print(f"  by {name_of_groups}: entropy, steps, misread in 100, margin")
            for rows in members:
                means = [x[rows].double().mean().item() for x in (entropy, kept["steps"], 100 * wrong, margin)]
                print("    {:.3f}  {:.1f}  {:.1f}  {:.2f}".format(*means))
        if (guidance, name) == (GUIDED, "entropy"):
            orders = [rows[entropy[rows].argsort()] for rows in groups["classes"]]
            rows = [torch.stack([order[place] for order in orders]) for place in (0, 1, 2, -3, -2, -1)]
            pictures.save(pictures.grid(images[torch.cat(rows)], len(orders), 2), HERE / "difficulty.png")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ckpt", nargs="?", default="runs/digits_c2i")
    parser.add_argument("num", nargs="?", type=int, default=1000)
    arguments = parser.parse_args()
    measure(arguments.ckpt, arguments.num)
    plot(tabulate())
    look(arguments.ckpt)


if __name__ == "__main__":
    run_study(main)
