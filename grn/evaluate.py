"""python -m grn.evaluate ckpt=runs/digits_c2i: scores a checkpoint, writes metrics.json (conf/evaluate.yaml).

Also as several processes, by `torchrun --nproc-per-node N -m grn.evaluate ...` or srun (with --kill-on-bad-exit, for
when a process is killed): the images are dealt to them, and the first one writes and prints the same metrics.
"""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from grn import pictures
from grn.checkpoints.exported import is_exported_refiner
from grn.checkpoints.native import load_tokenizer, read_checkpoint
from grn.cli import MISTAKES, entry_point
from grn.compiling import compile_network
from grn.data.datamodule import SPLITS
from grn.data.streaming import check_foreign_urls, rank_and_world_size, report_skipped
from grn.errors import UserError
from grn.evaluation import build_scores, real_splits, score_reconstructions, score_samples, steps_by_class
from grn.files import write_json
from grn.generation import Batch, best_device, equal_labels
from grn.launch import place
from grn.metrics.nearest import NearestTrainingDistance
from grn.metrics.splits import Split, image_batches
from grn.modules import build_sampler, load_refiner, module_from_checkpoint
from grn.networks.pretrained import is_pretrained
from grn.networks.tokenizer import for_inference
from grn.processes import gather, join, together
from grn.sample_archive import SampleArchive
from grn.sweeps import objective
from grn.training import RefinerModule, TextRefinerModule, TokenizerModule

log = logging.getLogger(__name__)

SHOWN = 100  # samples in the grid


@entry_point("evaluate")
def main(config: DictConfig) -> float | None:
    config.out = HydraConfig.get().runtime.output_dir  # a sweep's points have a folder each
    try:
        return objective(evaluate(config), config.monitor)
    except MISTAKES:
        if place()[0] == 0:
            raise
        sys.exit(1)  # all processes end with the same mistake, or tell the first one of theirs: it says it for all


def evaluate(config: DictConfig) -> dict[str, float]:
    """Scores a refiner's samples or a tokenizer's reconstructions; writes `metrics.json` into `out`.

    Returns:
        The metrics, on every process; their number changes none but `seconds`.
    """
    device = join(best_device(config.device))
    rank, _ = rank_and_world_size()
    with together():
        module, trained, subject = _load(config)
        if isinstance(module, TextRefinerModule):  # scores refer to them, as they do in a run's config
            OmegaConf.update(config, "training.prompts", module.prompts, force_add=True)
        module = module.to(device)
        if isinstance(module, TokenizerModule):
            if config.images:
                raise UserError("images=true keeps the samples of a refiner: leave it out for a tokenizer")
            for_inference(module.network, dtype=torch.bfloat16 if config.bf16 else None, compile=config.compile)
        elif config.compile:
            compile_network(module.network, device, key="compile")
        datamodule = instantiate(_data(config, trained))
        partials = instantiate(trained.scores if config.scores is None else config.scores)
    start = time.perf_counter()
    with (
        Progress(transient=True, disable=rank > 0) as progress,
        torch.autocast(device.type, torch.bfloat16, enabled=config.bf16),
    ):
        if isinstance(module, TokenizerModule):
            metrics, settings = {}, {}
            # Of a mixture, each data set is scored for itself.
            for prefix, part in getattr(datamodule, "parts", {"": datamodule}).items():
                task = progress.add_task(f"reconstructing {prefix}", total=None)
                with together():
                    splits = real_splits(part)
                    scores = build_scores(partials, splits, device=device, cache_dir=Path(config.cache_dir))
                scored = score_reconstructions(module, scores, part, lambda n, task=task: progress.advance(task, n))
                metrics |= {f"{prefix}/{key}" if prefix else key: value for key, value in scored.items()}
            report_skipped(datamodule.skipped())
        else:
            metrics, settings = _score_refiner(config, module, datamodule, partials, progress)
    metrics["seconds"] = round(time.perf_counter() - start, 2)
    metrics = {name: value if isinstance(value, int) else round(float(value), 6) for name, value in metrics.items()}
    if rank == 0:
        write_json(Path(config.out) / "metrics.json", {**subject, **settings, "metrics": metrics})
        _print(metrics, subject, Path(config.out))
    return metrics


def _score_refiner(
    config: DictConfig,
    module: RefinerModule,
    datamodule: LightningDataModule,
    partials: dict[str, Any],
    progress: Progress,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Samples and scores; also writes the pictures and, where asked for, the samples: (metrics, settings)."""
    out, (rank, world_size) = Path(config.out), rank_and_world_size()
    with together():
        splits = real_splits(datamodule, clips=module.token_shape[1] > 1)
        scores = build_scores(partials, splits, device=module.device, cache_dir=Path(config.cache_dir))
        sampler = build_sampler(config.sampler, module.sampler)
    if config.images and module.token_shape[1] > 1:
        raise UserError(
            "images=true keeps images, this refiner's samples are clips: leave it out (grn.sample writes mp4)"
        )
    archive = SampleArchive(out / "samples.npz", rank=rank, world_size=world_size) if config.images else None
    task = progress.add_task("sampling and scoring", total=len(range(rank, config.num, world_size)))
    shown: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(batch: Batch) -> None:
        progress.advance(task, len(batch.ids))
        if (first := batch.ids < SHOWN).any():
            shown.append((batch.ids[first], batch.images.cpu()[first]))
        if archive is not None:
            archive.add(batch.images, batch.ids)

    with archive or nullcontext():
        metrics, steps = score_samples(
            module,
            scores,
            num=config.num,
            batch_size=config.batch_size,
            seed=config.seed,
            sampler=sampler,
            rank=rank,
            world_size=world_size,
            watch=watch,
        )
        if archive is not None:
            archive.save(equal_labels(config.num, range(module.num_labels)))
    _pictures(shown, scores, splits["train"], out)
    counts, by_class = steps.sum(dim=0).tolist(), [round(mean, 3) for mean in steps_by_class(steps)]
    if rank == 0:
        pictures.save(pictures.steps_chart(counts, by_class), out / "steps.png")
    histogram = {number: count for number, count in enumerate(counts) if count}
    settings = {"num": config.num, "seed": config.seed, "sampler": repr(sampler)}
    return metrics, settings | {"steps_histogram": histogram, "steps_by_class": by_class}


def _load(config: DictConfig) -> tuple[LightningModule, DictConfig | None, dict[str, Any]]:
    """(the module, its training config, what `metrics.json` says of it); exports and official files have no config."""
    official = config.tokenizer.model is not None
    if official or is_pretrained(config.ckpt) or is_exported_refiner(config.ckpt):
        if "_target_" not in config.data or config.scores is None:
            raise UserError(
                f"ckpt={config.ckpt} does not know its data: give data=... and scores=..., e.g. "
                "data=imagenet scores=imagenet (of a tokenizer scores=imagenet_reconstruction)"
            )
        if not official and is_exported_refiner(config.ckpt):
            module, subject = load_refiner(config.ckpt, ema=config.ema)
            return module, None, subject
        network, record = load_tokenizer(
            config.ckpt, embed=False, official=config.tokenizer.model, ema=config.ema, key="ckpt"
        )
        module = TokenizerModule(network, perceptual_weight=0.0, gan_weight=0.0).eval()
        return module, None, {key: record[key] for key in ("path", "step", "sha256")}
    checkpoint = read_checkpoint(config.ckpt)
    module = module_from_checkpoint(checkpoint, ema=config.ema)
    return module, checkpoint.config, {"ckpt": str(checkpoint.path), "step": checkpoint.step}


def _data(config: DictConfig, trained: DictConfig | None) -> DictConfig:
    """The data that were asked for, or those that the checkpoint was trained on."""
    if "_target_" in config.data:
        return config.data
    given = _overrides(trained.data, config.data)
    check_foreign_urls(f"ckpt={config.ckpt}", dict(_foreign(trained.data, given, "data")))
    return OmegaConf.merge(trained.data, given)


def _overrides(trained: DictConfig, overrides: DictConfig) -> dict[str, Any]:
    given = {key: value for key, value in overrides.items() if value is not None}
    if "parts" not in trained:
        return given
    of_parts = given.pop("parts", {})
    if odd := of_parts.keys() - trained.parts.keys():
        raise UserError(f"data.parts.{min(odd)}: the checkpoint's data have only {', '.join(trained.parts)}")
    if odd := given.keys() - {"num_workers", "eval_batch_size"}:
        raise UserError(f"data.{min(odd)}: of a mixture, give +data.parts.<name>.{min(odd)}=... instead")
    return {"parts": {part: OmegaConf.merge(given, of_parts.get(part, {})) for part in trained.parts}}


def _foreign(trained: DictConfig, given: Mapping[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    """(Key, value) of all that a checkpoint says of shards and nobody has given here."""
    for name, value in trained.items():
        own = given.get(name)
        if "_target_" in trained and name in SPLITS:
            if own is None:
                place = f"{key}.{name}" if key == "data" else f"+{key}.{name}"  # which conf/data/checkpoint.yaml lacks
                yield place, OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
        elif isinstance(value, DictConfig):
            yield from _foreign(value, own or {}, f"{key}.{name}")


def _pictures(shown: list[tuple[torch.Tensor, torch.Tensor]], scores: dict, train: Split, out: Path) -> None:
    """`samples.png`; and `nearest.png`, samples beside the training images that come nearest, where that is scored.

    Every rank must call it.

    Args:
        shown: (ids int64 [B], images uint8 [B, 3, H, W]) of this rank's share of the first samples, on the CPU.
        train: the split that `scores` have seen.
    """
    neighbours = [s.neighbours()[:20] for s in scores.values() if isinstance(s, NearestTrainingDistance)]
    ids, images = map(torch.cat, zip(*(pair for share in gather(shown) for pair in share)))
    if rank_and_world_size()[0] > 0:
        return
    images = images[ids.argsort()]
    pictures.save(pictures.grid(images, 10, pictures.scale_for(images.shape[-1])), out / "samples.png")
    for places in neighbours:
        training = torch.cat(list(image_batches(train, name="training")))
        pictures.save(pictures.grid(torch.cat([images[:20], training[places]]), 20, 2), out / "nearest.png")


def _print(metrics: dict[str, float], subject: dict[str, Any], out: Path) -> None:
    table = Table(title=", ".join(f"{key} {value}" for key, value in subject.items()))
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, str(value) if isinstance(value, int) else f"{value:.4f}")
    Console().print(table)
    log.info("written: %s", out / "metrics.json")


if __name__ == "__main__":
    main()
