"""python -m grn.evaluate ckpt=runs/digits_c2i: scores a checkpoint, writes metrics.json (conf/evaluate.yaml)."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import LightningModule
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from grn import pictures
from grn.checkpoints.exported import is_exported_refiner
from grn.checkpoints.native import load_tokenizer, read_checkpoint
from grn.cli import entry_point
from grn.data.streaming import report_skipped
from grn.errors import UserError
from grn.evaluation import build_scores, score_reconstructions, score_samples
from grn.files import write_json
from grn.generation import best_device
from grn.metrics.nearest import NearestTrainingDistance
from grn.modules import build_sampler, load_refiner, module_from_checkpoint
from grn.networks.pretrained import is_pretrained
from grn.networks.tokenizer import for_inference
from grn.training import TokenizerModule

log = logging.getLogger(__name__)


@entry_point("evaluate")
def main(config: DictConfig) -> None:
    config.out = HydraConfig.get().runtime.output_dir  # a sweep's points have a folder each
    evaluate(config)


def evaluate(config: DictConfig) -> dict[str, float]:
    """Scores a refiner's samples or a tokenizer's reconstructions; writes `metrics.json` into `out`."""
    device = best_device(config.device)
    module, trained, subject = _load(config)
    module = module.to(device)
    if isinstance(module, TokenizerModule):
        for_inference(module.network, dtype=torch.bfloat16 if config.bf16 else None, compile=config.compile)
    elif config.compile:
        module.network.compile()
    datamodule = instantiate(config.data if "_target_" in config.data else _merged(trained.data, config.data))
    partials = instantiate(trained.scores if config.scores is None else config.scores)
    start = time.perf_counter()
    with Progress(transient=True) as progress, torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        if isinstance(module, TokenizerModule):
            metrics, settings = {}, {}
            # Of a mixture, each data set is scored for itself.
            for prefix, part in getattr(datamodule, "parts", {"": datamodule}).items():
                task = progress.add_task(f"reconstructing {prefix}", total=None)
                scores = build_scores(partials, part, device=device, cache_dir=Path(config.cache_dir))
                scored = score_reconstructions(module, scores, part, lambda n, task=task: progress.advance(task, n))
                metrics |= {f"{prefix}/{key}" if prefix else key: value for key, value in scored.items()}
            report_skipped(datamodule.skipped())
        else:
            scores = build_scores(partials, datamodule, device=device, cache_dir=Path(config.cache_dir))
            sampler = build_sampler(config.sampler, module.sampler)
            task = progress.add_task("sampling and scoring", total=config.num)
            metrics, images = score_samples(
                module,
                scores,
                num=config.num,
                batch_size=config.batch_size,
                seed=config.seed,
                sampler=sampler,
                advance=lambda n: progress.advance(task, n),
            )
            settings = {"num": config.num, "seed": config.seed, "sampler": repr(sampler)}
            _pictures(images, scores, datamodule, Path(config.out))
    metrics["seconds"] = round(time.perf_counter() - start, 2)
    metrics = {name: value if isinstance(value, int) else round(float(value), 6) for name, value in metrics.items()}
    write_json(Path(config.out) / "metrics.json", {**subject, **settings, "metrics": metrics})
    _print(metrics, subject, Path(config.out))
    return metrics


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


def _merged(trained: DictConfig, overrides: DictConfig) -> DictConfig:
    given = {key: value for key, value in overrides.items() if value is not None}
    if "parts" not in trained:
        return OmegaConf.merge(trained, given)
    if odd := given.keys() - {"num_workers", "eval_batch_size"}:
        raise UserError(f"data.{min(odd)}: of a mixture, give +data.parts.<name>.{min(odd)}=... instead")
    return OmegaConf.merge(trained, {"parts": dict.fromkeys(trained.parts, given)})


def _pictures(images: torch.Tensor, scores: dict, datamodule, out: Path) -> None:
    """`samples.png`; and `nearest.png`, samples beside the training images that come nearest, where that is scored."""
    shown = images[:100]
    pictures.save(pictures.grid(shown, 10, pictures.scale_for(images.shape[-1])), out / "samples.png")
    for score in scores.values():
        if isinstance(score, NearestTrainingDistance):
            training = torch.cat([batch["pixels"][:, :, 0] for batch in datamodule.split_dataloader("train")])
            pairs = torch.cat([images[:20], training[score.neighbours()[:20].cpu()]])
            pictures.save(pictures.grid(pairs, 20, 2), out / "nearest.png")


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
