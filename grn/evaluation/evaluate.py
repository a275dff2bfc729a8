"""Scores of a checkpoint, on one process or several: what `python -m grn.evaluate` does."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning import LightningDataModule
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress
from rich.table import Table

from grn.checkpoints.exported import is_exported_refiner
from grn.checkpoints.native import load_tokenizer, read_checkpoint
from grn.checkpoints.sampler_config import build_sampler, sampler_config
from grn.checkpoints.trust import check_group, named_files
from grn.data.datamodule import SPLITS, ShardsDataModule
from grn.data.stream.streaming import check_foreign_urls, report_skipped
from grn.evaluation.archive import SampleArchive, remove_parts
from grn.evaluation.record import folder_for, provenance, settings
from grn.evaluation.scoring import (
    build_scores,
    check_num,
    check_scores,
    real_splits,
    score_reconstructions,
    score_samples,
    steps_by_class,
    uncertainties,
)
from grn.evaluation.suites import Layout, Suite, read_suite, scorer, with_lines
from grn.media import pictures
from grn.metrics.headlines import headlines
from grn.metrics.nearest import NearestTrainingDistance
from grn.metrics.splits import Split, image_batches
from grn.networks.tokenizer import HBQTokenizer, for_inference
from grn.runs.wandb_runs import log_results
from grn.runtime.configs import merged, plain
from grn.runtime.errors import UserError, check_count
from grn.runtime.files import write_json
from grn.runtime.ranks import gather, gather_counts, join, rank_and_world_size, together
from grn.runtime.tables import show
from grn.runtime.wandb_login import wandb_offline
from grn.sampling.bundle import RefinerBundle
from grn.sampling.generation import Batch, Refining, best_device, check_memory
from grn.sampling.loading import bundle_from_checkpoint, load_refiner, network_from_checkpoint
from grn.sampling.official import load_official_refiner
from grn.sampling.request import Request
from grn.sampling.text_bundle import TextRefinerBundle
from grn.training.compiling import check_mode, compile_network
from grn.weights.kinds import is_pretrained

log = logging.getLogger(__name__)

SHOWN, COLUMNS = 100, 10  # samples in the grid, and in a row of it
ARCHIVE = "samples.npz"
OF_SAMPLES = ("num", "seed", "batch_size", "sampler")  # keys that say how a refiner draws samples


def evaluate(config: DictConfig) -> dict[str, float]:
    """Scores a refiner's samples or a tokenizer's reconstructions; writes `metrics.json` into `out`.

    Results of other settings are not overwritten (`grn.evaluation.record.folder_for`), unless `overwrite` says so;
    `config.out` is where they went.

    Returns:
        The metrics, on every process; their number changes none but `seconds`.
    """
    mode = check_mode(config.compile_mode, config.compile, key="compile")
    device = join(best_device(config.device))
    rank, _ = rank_and_world_size()
    with together():
        suite = read_suite(config.suite)
        model, trained, subject = _load(config)
        if suite is not None:
            if not isinstance(model, TextRefinerBundle):
                raise UserError(f"suite={suite.name} has prompts, and {config.ckpt} is no text refiner: leave it out")
            if "num" in _keys_given():
                raise UserError(
                    f"num={config.num}: suite={suite.name} draws suite.samples of each prompt: leave num out"
                )
            config.num = suite.num
        if isinstance(model, TextRefinerBundle):  # scores refer to them, as they do in a run's config
            prompts = model.prompts if suite is None else list(suite.prompts)
            OmegaConf.update(config, "training.prompts", prompts, force_add=True)
        model = model.to(device)
        if not isinstance(model, RefinerBundle):
            if config.images:
                raise UserError("images=true keeps the samples of a refiner: leave it out for a tokenizer")
            if mode != "default":
                raise UserError(f"compile_mode={mode} is for refiners: leave it out for a tokenizer")
            for key in _keys_given():
                if key.partition(".")[0] in OF_SAMPLES:
                    raise UserError(f"{key} says how a refiner draws samples: leave it out for a tokenizer")
            for_inference(model, dtype=torch.bfloat16 if config.bf16 else None, compile=config.compile)
        elif config.compile:
            compile_network(model.network, device, key="compile", mode=mode)
        if suite is None or config.scores is not None:
            data, scored = _data(config, trained), _scores(config, trained)
        else:  # all that a suite's own scores need are samples
            data, scored = None, OmegaConf.create({})
        if suite is not None:
            scored = merged(scored, scorer(config.suite))
        datamodule: Any = None if data is None else instantiate(data)
        partials = instantiate(scored)
        if suite is not None:
            partials = with_lines(partials, suite)
        wanted = _settings(config, model, subject, data, scored, suite)
        config.out = str(_out(config, wanted))
    config.out = gather(config.out)[0]  # the first rank has looked before any of them writes
    start = time.perf_counter()
    with (
        Progress(transient=True, disable=rank > 0) as progress,
        torch.autocast(device.type, torch.bfloat16, enabled=config.bf16),
    ):
        if not isinstance(model, RefinerBundle):
            metrics, uncertainty, told = {}, {}, {}
            # Of a mixture, each data set is scored for itself.
            for prefix, part in getattr(datamodule, "parts", {"": datamodule}).items():
                task = progress.add_task(f"reconstructing {prefix}", total=None)
                with together():
                    if isinstance(part, ShardsDataModule):
                        part.check_val()
                    splits = real_splits(part)
                    scores = build_scores(partials, splits, device=device, cache_dir=Path(config.cache_dir))
                found = score_reconstructions(model, scores, part, lambda n, task=task: progress.advance(task, n))
                metrics |= {f"{prefix}/{key}" if prefix else key: value for key, value in found.items()}
            report_skipped(gather_counts(datamodule.skipped()), gather_counts(datamodule.noted()))
        else:
            metrics, uncertainty, told = _score_refiner(config, model, datamodule, partials, progress, suite)
    metrics["seconds"] = round(time.perf_counter() - start, 2)
    metrics = {name: value if isinstance(value, int) else round(float(value), 6) for name, value in metrics.items()}
    if rank == 0:
        network = model.network if isinstance(model, RefinerBundle) else model
        told |= {"settings": wanted, "provenance": provenance(network), "uncertainty": uncertainty}
        write_json(Path(config.out) / "metrics.json", {**subject, **told, "metrics": metrics})
        if config.wandb and "ckpt" in subject:
            shown = dict(metrics)
            if isinstance(model, RefinerBundle):
                shown |= {name: Path(config.out) / f"{name}.png" for name in ("samples", "steps")}
            results = {f"evaluate/{name}": value for name, value in shown.items()}
            log_results(subject["ckpt"], results, step=subject["step"], offline=wandb_offline())
        _print(metrics, uncertainty, subject, Path(config.out))
    return metrics


def _score_refiner(
    config: DictConfig,
    bundle: RefinerBundle,
    datamodule: LightningDataModule | None,
    partials: dict[str, Any],
    progress: Progress,
    suite: Suite | None,
) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
    """Samples and scores; also writes the pictures and, where asked for, the samples: (metrics, their uncertainty,
    what `metrics.json` says beside them)."""
    out, (rank, world_size) = Path(config.out), rank_and_world_size()
    with together():
        prompts = None if suite is None else suite.drawn
        num_labels = bundle.num_conditions if prompts is None else len(prompts)
        check_num(config.num, num_labels)
        check_scores(partials, config.num)
        if rank == 0:
            remove_parts(out / ARCHIVE)
        clips = bundle.token_shape[1] > 1
        no_data: dict[str, Split] = dict.fromkeys(SPLITS, tuple)
        splits = no_data if datamodule is None else real_splits(datamodule, clips=clips)
        layout = None
        if suite is not None and config.suite.layout:
            layout = Layout(config.suite.kind, suite, out / suite.name, clips=clips, fps=config.suite.fps)
        scores = build_scores(partials, splits, device=bundle.device, cache_dir=Path(config.cache_dir))
        sampler = build_sampler(config.sampler, bundle.sampler)
    if config.images and bundle.token_shape[1] > 1:
        raise UserError(
            "images=true keeps images, this refiner's samples are clips: leave it out (grn.sample writes mp4)"
        )
    archive = SampleArchive(out / ARCHIVE, rank=rank, world_size=world_size) if config.images else None
    check_count("num", config.num)
    check_memory(
        bundle, bundle.complete(Request(num=config.num, sampler=sampler, prompts=prompts)), batch_size=config.batch_size
    )
    share = len(range(rank, config.num, world_size))
    task = progress.add_task("sampling and scoring", total=share)
    shown: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(batch: Batch) -> None:
        if (first := batch.ids < SHOWN).any():
            shown.append((batch.ids[first], batch.images.cpu()[first]))
        if archive is not None:
            archive.add(batch.images, batch.ids)
        if layout is not None:
            layout.add(batch)

    with archive or nullcontext():
        metrics, steps = score_samples(
            bundle,
            scores,
            num=config.num,
            batch_size=config.batch_size,
            seed=config.seed,
            sampler=sampler,
            prompts=prompts,
            rank=rank,
            world_size=world_size,
            watch=watch,
            watch_steps=Refining(share, lambda done: progress.update(task, completed=done)),
        )
        if archive is not None:
            archive.save(torch.arange(config.num) % num_labels)
    with together():
        if layout is not None and rank == 0:
            layout.finish()
    grid = _pictures(shown, scores, splits["train"], out)
    counts, by_class = steps.sum(dim=0).tolist(), [round(mean, 3) for mean in steps_by_class(steps)]
    if rank == 0:
        pictures.save(pictures.steps_chart(counts, by_class), out / "steps.png")
    histogram = {number: count for number, count in enumerate(counts) if count}
    told = {} if suite is None else {"suite": suite.record}
    told |= {"num": config.num, "seed": config.seed, "sampler": repr(sampler)}
    told |= {"steps_histogram": histogram, "steps_by_class": by_class, "shown": grid}
    return metrics, uncertainties(scores.values()), told


def _settings(
    config: DictConfig,
    model: RefinerBundle | HBQTokenizer,
    subject: dict[str, Any],
    data: DictConfig | None,
    scores: DictConfig,
    suite: Suite | None,
) -> dict[str, Any]:
    """What the metrics depend on beside the weights."""
    # As parts of their config, which they may refer to (${paths.data}).
    told = {name: plain(it, resolve=True) if it else {} for name, it in (("data", data), ("scores", scores))}
    found = {"ckpt": subject.get("ckpt", subject.get("path")), "ema": config.ema, "bf16": config.bf16}
    found |= {key: subject[key] for key in ("task", "size") if key in subject}
    if isinstance(model, RefinerBundle):
        found |= {"num": config.num, "seed": config.seed}
        found["sampler"] = sampler_config(build_sampler(config.sampler, model.sampler))
    if suite is not None:
        found["suite"] = suite.record | {"prompts": list(suite.drawn)}
    return settings(**found, **told)


def _keys_given() -> list[str]:
    """Of the command line; called from Python, none."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    return [override.partition("=")[0].lstrip("+~") for override in given]


def _out(config: DictConfig, wanted: dict[str, Any]) -> Path:
    given = True
    if HydraConfig.initialized():  # else called from Python, where `out` is named
        running = HydraConfig.get()
        given = running.mode == RunMode.MULTIRUN or any(it.startswith("out=") for it in running.overrides.task)
    return folder_for(Path(config.out), wanted, given=given, overwrite=config.overwrite)


def _load(config: DictConfig) -> tuple[RefinerBundle | HBQTokenizer, DictConfig | None, dict[str, Any]]:
    """(What is scored, its training config, what `metrics.json` says of it); exports and official files have no
    config."""
    official = config.tokenizer.model is not None
    if config.task is not None or official or is_pretrained(config.ckpt) or is_exported_refiner(config.ckpt):
        if config.suite.name is None and ("_target_" not in config.data or config.scores is None):
            raise UserError(
                f"ckpt={config.ckpt} does not know its data: give data=... and scores=..., e.g. "
                "data=imagenet scores=imagenet (of a tokenizer scores=imagenet_reconstruction)"
            )
        if config.task is not None:
            bundle, subject = load_official_refiner(
                config.ckpt, task=config.task, size=config.model_size, size_key="model_size", ema=config.ema
            )
            return bundle, None, subject
        if not official and is_exported_refiner(config.ckpt):
            bundle, subject = load_refiner(config.ckpt, ema=config.ema)
            return bundle, None, subject
        tokenizer, record = load_tokenizer(
            config.ckpt, embed=False, official=config.tokenizer.model, ema=config.ema, key="ckpt"
        )
        return tokenizer.eval(), None, {key: record[key] for key in ("path", "step", "sha256")}
    checkpoint = read_checkpoint(config.ckpt)
    subject = {"ckpt": str(checkpoint.path), "step": checkpoint.step}
    if checkpoint.kind == "tokenizer":
        return network_from_checkpoint(checkpoint, ema=config.ema).eval(), checkpoint.config, subject
    return bundle_from_checkpoint(checkpoint, ema=config.ema), checkpoint.config, subject


def _data(config: DictConfig, trained: DictConfig | None) -> DictConfig:
    """The data that were asked for, or those that the checkpoint was trained on."""
    if "_target_" in config.data:
        return config.data
    if trained is None:
        raise UserError(f"ckpt={config.ckpt} does not know its data, which scores read: give data=...")
    given = _overrides(trained.data, config.data)
    check_foreign_urls(f"ckpt={config.ckpt}", dict(_foreign(trained.data, given, "data")))
    check_group("data", OmegaConf.to_container(trained.data), f"ckpt: {config.ckpt} is not to be trusted")
    return merged(trained.data, given)


def _scores(config: DictConfig, trained: DictConfig | None) -> DictConfig:
    """The scores that were asked for, or those of the checkpoint; of these, files are given here: a file that a
    checkpoint names may be any on this machine, and TorchScript is a program."""
    given = OmegaConf.create(plain(config.scores or OmegaConf.create({}), resolve=True))
    added = {str(name) for name, score in given.items() if "_target_" not in (score or {})}
    if config.scores is not None and not added:
        return given
    own = {} if trained is None or trained.scores is None else plain(trained.scores)
    if odd := added - own.keys():
        raise UserError(f"scores.{min(odd)}: the checkpoint's scores are {', '.join(own) or 'none'}; choose scores=...")
    check_group("scores", own, f"ckpt: {config.ckpt} is not to be trusted")
    for key, file in named_files("scores", own).items():
        if OmegaConf.select(given, key.removeprefix("scores.")) is None:
            raise UserError(
                f"ckpt={config.ckpt}: its {key} names the file {file}, and files of scores are given here: add "
                f"+{key}=... or choose scores=..."
            )
    return merged(own, given)


def _overrides(trained: DictConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in overrides.items() if value is not None}
    if "parts" not in trained:
        return given
    of_parts = given.pop("parts", {})
    if odd := of_parts.keys() - trained.parts.keys():
        raise UserError(f"data.parts.{min(odd)}: the checkpoint's data have only {', '.join(trained.parts)}")
    if odd := given.keys() - {"num_workers", "eval_batch_size"}:
        raise UserError(f"data.{min(odd)}: of a mixture, give +data.parts.<name>.{min(odd)}=... instead")
    return {"parts": {part: merged(given, of_parts.get(part, {})) for part in trained.parts}}


def _foreign(trained: Mapping[str, Any], given: Mapping[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    """(Key, value) of all that a checkpoint says of shards and nobody has given here."""
    for name, value in trained.items():
        own = given.get(name)
        if "_target_" in trained and name in SPLITS:
            if own is None:
                place = f"{key}.{name}" if key == "data" else f"+{key}.{name}"  # which conf/data/checkpoint.yaml lacks
                yield place, OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
        elif isinstance(value, DictConfig):
            yield from _foreign(value, own or {}, f"{key}.{name}")


def _pictures(shown: list[tuple[torch.Tensor, torch.Tensor]], scores: dict, train: Split, out: Path) -> dict[str, int]:
    """`samples.png`; and `nearest.png`, samples beside the training images that come nearest, where that is scored.

    Every rank must call it.

    Args:
        shown: (ids int64 [B], images uint8 [B, 3, H, W]) of this rank's share of the first samples, on the CPU.
        train: the split that `scores` have seen.

    Returns:
        How `samples.png` is laid out, row by row, for `grn.compare`; of the first rank alone.
    """
    neighbours = [s.neighbours()[:20] for s in scores.values() if isinstance(s, NearestTrainingDistance)]
    ids, images = map(torch.cat, zip(*(pair for share in gather(shown) for pair in share)))
    if rank_and_world_size()[0] > 0:
        return {}
    images = images[ids.argsort()]
    (height, width), scale = images.shape[-2:], pictures.scale_for(images.shape[-1])
    pictures.save(pictures.grid(images, COLUMNS, scale), out / "samples.png")
    for places in neighbours:
        training = torch.cat(list(image_batches(train, name="training")))
        pictures.save(pictures.grid(torch.cat([images[:20], training[places]]), 20, 2), out / "nearest.png")
    return {"count": len(images), "columns": COLUMNS, "height": height, "width": width, "scale": scale}


def _print(metrics: dict[str, float], uncertainty: dict[str, float], subject: dict[str, Any], out: Path) -> None:
    """The metrics that matter most, and where all of them are."""
    table = Table(title=", ".join(f"{key} {value}" for key, value in subject.items()))
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in headlines(metrics).items():
        table.add_row(name, value + (f" ± {uncertainty[name]:.4f}" if name in uncertainty else ""))
    show(table)
    log.info("%d metrics: %s", len(metrics), out / "metrics.json")
