"""Do adaptive steps pay where prompts differ in difficulty by construction? (README.md)

    python experiments/adaptive_critters/study.py [--guidances 1 2] [--steps 4 8] [--seeds 1 2 3]

from where data/critters is (pip install -e '.[critters,studies]'). What runs/adaptive_critters holds is not measured
again, so that several of these, each with a part of the seeds, and then one of all write the table and plot.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.figure import Figure
from torch import Tensor

import grn.cli.entry  # noqa: F401  its resolvers
from grn.cli.entry import CONF
from grn.media.pixels import from_uint8
from grn.method.schedules import Linear, Schedule
from grn.metrics.features import FeatureStatistics
from grn.metrics.fid import as_numpy, frechet_distance
from grn.runtime.files import write_json
from grn.sampling.bundle import RefinerBundle
from grn.sampling.calibration import steps_taken
from grn.sampling.generation import generate
from grn.sampling.loading import load_refiner
from grn.sampling.request import Request
from grn.studies.plots import error_bars, log_x
from grn.studies.results import Column, markdown, over_seeds, read_points, write_csv
from grn.studies.schedules import ShuffledUnscaled, Unscaled, calibrated
from grn.studies.study import folder_of, missing, run_study
from grn.toys.critters import SHORT_WORDINGS, WORDINGS, Critter, caption, read_caption
from grn.toys.critters_judge import UNTOLD, CrittersJudge

HERE = Path(__file__).parent
OUT = folder_of("adaptive_critters")
KINDS, EACH = ("whole", "short"), 100  # captions that tell six attributes, and two or three; prompts of each kind
STEPS, BATCH, CALIBRATION_SEED = (1, 2, 3, 4, 8, 16), 50, 1000
SCHEDULES = ("linear", "entropy", "unscaled", "shuffled")


def prompts_of(root: Path) -> tuple[str, ...]:
    """Of the suite's held-out critters of pairs that training shows: all whole captions, then all short ones."""
    lines = [json.loads(line) for line in (root / "suite.jsonl").read_text().splitlines()]
    critters = [Critter(*(line[name] for name in Critter._fields)) for line in lines if line["tag"] == "seen"][:EACH]
    short = [caption(it, SHORT_WORDINGS[i % len(SHORT_WORDINGS)]) for i, it in enumerate(critters)]
    return (*(caption(it, WORDINGS[0]) for it in critters), *short)


def schedule(name: str, steps: int, bundle: RefinerBundle, guidance: float, prompts: tuple[str, ...]) -> Schedule:
    """Of so many steps in the mean over both kinds."""
    if name == "linear":
        return Linear(steps)
    request = Request(prompts=prompts, seed=CALIBRATION_SEED)
    guided, entropy = calibrated(steps, bundle, request, guidance, batch_size=BATCH)
    if name == "shuffled":
        return ShuffledUnscaled(**vars(guided), plans=steps_taken(guided, entropy))
    return Unscaled(**vars(guided)) if name == "unscaled" else guided


@torch.no_grad()
def judged(judge: CrittersJudge, images: Tensor, asked: Tensor) -> dict[str, float]:
    """What the judge says of images uint8 [N, 3, 64, 64] asked for with attributes int64 [N, 6].

    accuracy: of attributes told, the mean over images. certainty: the judge's largest probability, the mean over all
    attributes, told or not. fd: the Fréchet distance to the training pictures in its features.
    """
    features = judge.network.features(images.float() / 127.5 - 1)
    heads = (head(features).softmax(dim=1).max(dim=1) for head in judge.network.heads)
    certain, read = (torch.stack(part, dim=1) for part in zip(*heads))
    (own := FeatureStatistics(features.shape[1])).update(features)
    accuracy = ((read == asked).sum(dim=1) / (asked != UNTOLD).sum(dim=1)).mean().item()
    distance = frechet_distance(as_numpy(own.compute()), judge.real)
    return {"accuracy": accuracy, "certainty": certain.mean().item(), "fd": distance}


def measure(ckpt: str, guidances: list[float], means: list[int], seeds: list[int]) -> None:
    """Leaves `<guidance>-<steps>-<schedule>-<seed>.json` of every point in OUT, and real.json."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("evaluate", [f"ckpt={ckpt}", "data=critters_t2i"])
    datamodule = instantiate(config.data)
    bundle, _ = load_refiner(ckpt)
    prompts = prompts_of(Path(config.data.root))
    asked = torch.tensor([read_caption(prompt) for prompt in prompts])
    splits = {name: lambda name=name: datamodule.split_dataloader(name) for name in ("train", "val")}
    judge = CrittersJudge(prompts=prompts, **splits, cache_dir=OUT)
    schedule_of = cache(lambda guidance, name, steps: schedule(name, steps, bundle, guidance, prompts))
    points = product(guidances, SCHEDULES, means, seeds)
    points = [point for point in points if point[1] == "linear" or point[2] >= 3]  # else there is nothing to adapt

    def path_of(guidance: float, name: str, steps: int, seed: int) -> Path:
        return OUT / f"{guidance:g}-{steps}-{name}-{seed}.json"

    for (guidance, name, steps, seed), path in missing(points, path_of):
        sampler = replace(bundle.sampler, schedule=schedule_of(guidance, name, steps), guidance=guidance)
        request = Request(prompts=prompts, num=len(prompts), seed=seed, sampler=sampler)
        row, started = {"guidance": guidance, "schedule": name, "steps": steps, "seed": seed}, time.process_time()
        batches = list(generate(bundle, request, batch_size=BATCH))
        order = torch.cat([it.ids for it in batches]).argsort()
        images = torch.cat([it.images for it in batches])[order]
        row["cpu_seconds"] = time.process_time() - started
        taken = torch.cat([it.refined.steps for it in batches])[order].double()
        entropy = torch.cat([it.refined.decision_entropy for it in batches])[order]
        # How often a short caption's sample has the higher entropy than a whole one's.
        apart = (entropy[EACH:, None] > entropy[None, :EACH]).double().mean().item()
        row |= {"steps_mean": taken.mean().item(), "told_apart": apart}
        for place, kind in enumerate(KINDS):
            part = slice(place * EACH, (place + 1) * EACH)
            found = judged(judge, images[part], asked[part])
            found |= {"steps": taken[part].mean().item(), "steps_std": taken[part].std().item()}
            row |= {f"{key}_{kind}": value for key, value in found.items()}
        write_json(path, row)
        print(json.dumps(row), flush=True)
    if not (OUT / "real.json").is_file():  # for scale: held-out pictures, three times as many as samples of a kind
        batches = list(datamodule.split_dataloader("val"))
        real = torch.stack([it for batch in batches for it in batch["pixels"]])[: 3 * EACH]
        asked = torch.tensor([read_caption(text) for batch in batches for text in batch["caption"]])[: 3 * EACH]
        restored = bundle.decode(bundle.tokenizer.tokenize(from_uint8(real), bundle.labeling))
        found = {}
        for name, images in (("held-out", real), ("restored", restored)):
            found[name] = [judged(judge, *it) for it in zip(images[:, :, 0].split(EACH), asked.split(EACH))]
        write_json(OUT / "real.json", found)


def tabulate() -> pd.DataFrame:
    """Writes results.csv, prints it as a table; a row a guidance, number of steps and schedule, over seeds."""
    by = ("guidance", "steps", "schedule")
    points = read_points(OUT, by, ("seed",), order={"schedule": SCHEDULES}, pattern="*-*-*-*.json")
    table = over_seeds(points, by, [name for name in points if name not in ("seed", *by)])
    write_csv(table, HERE / "results.csv")
    columns = [Column("guidance", spec="g"), Column("steps_mean", "mean", spec=".2f"), Column("schedule")]
    shown = {"steps": (1, 1), "accuracy": (100, 1), "certainty": (100, 1), "fd": (1, 0)}  # factor, decimals
    for kind, (name, (scale, decimals)) in product(KINDS, shown.items()):
        columns.append(Column(f"{name}_{kind}", scale=scale, spec=f".{decimals}f"))
    print(markdown(table.drop(columns="steps_mean_error"), columns))
    for name, runs in json.loads((OUT / "real.json").read_text()).items():
        print(name, {key: statistics.mean(run[key] for run in runs) for key in runs[0]})
    return table


def plot(table: pd.DataFrame) -> None:
    """steps.png: by mean steps and kind of prompt, without guidance; bars are standard errors over seeds."""
    figure = Figure((11, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    own, styles = table[table.guidance == 1], dict(zip(SCHEDULES, ("o-C0", "D-C3", "D:C1", "x:C4")))
    labels = {"accuracy": "told attributes right", "certainty": "judge's certainty", "fd": "Fréchet distance"}
    for line, kind in zip(axes, KINDS):
        for axis, (name, label) in zip(line, labels.items()):
            error_bars(axis, own, "steps_mean", f"{name}_{kind}", "schedule", styles)
            log_x(axis, STEPS)
            axis.set(xlabel="mean steps over both kinds", ylabel=label, title=f"{kind} captions")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(HERE / "steps.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ckpt", nargs="?", default="experiments/critters/model")
    parser.add_argument("--guidances", type=float, nargs="*", default=[1.0])
    parser.add_argument("--steps", type=int, nargs="*", default=STEPS, help="in the mean over both kinds")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="none: only table and plot")
    arguments = parser.parse_args()
    if arguments.seeds:
        measure(arguments.ckpt, arguments.guidances, arguments.steps, arguments.seeds)
    plot(tabulate())


if __name__ == "__main__":
    run_study(main)
