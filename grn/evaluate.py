"""python -m grn.evaluate ckpt=runs/digits_c2i: scores a checkpoint, writes metrics.json (conf/evaluate.yaml)."""

import logging
import time
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from grn import pictures
from grn.checkpoints.native import Checkpoint, read_checkpoint
from grn.cli import entry_point
from grn.evaluation import build_scores, score_reconstructions, score_samples
from grn.files import write_json
from grn.generation import best_device
from grn.metrics.nearest import NearestTrainingDistance
from grn.modules import build_sampler, module_from_checkpoint

log = logging.getLogger(__name__)


@entry_point("evaluate")
def main(config: DictConfig) -> None:
    config.out = HydraConfig.get().runtime.output_dir  # a sweep's points have a folder each
    evaluate(config)


def evaluate(config: DictConfig) -> dict[str, float]:
    """Scores a refiner's samples or a tokenizer's reconstructions; writes `metrics.json` into `out`."""
    checkpoint = read_checkpoint(config.ckpt)
    device = best_device(config.device)
    module = module_from_checkpoint(checkpoint, ema=config.ema).to(device)
    overrides = {key: value for key, value in config.data.items() if value is not None}
    datamodule = instantiate(OmegaConf.merge(checkpoint.config.data, overrides))
    scores = build_scores(
        instantiate(config.scores or checkpoint.config.scores),
        datamodule,
        device=device,
        cache_dir=Path(config.cache_dir),
    )
    start = time.perf_counter()
    with Progress(transient=True) as progress, torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        if checkpoint.kind == "tokenizer":
            task = progress.add_task("reconstructing", total=None)
            metrics = score_reconstructions(module, scores, datamodule, lambda n: progress.advance(task, n))
            settings = {}
        else:
            sampler = build_sampler(config.sampler, checkpoint.config.sampler)
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
    write_json(
        Path(config.out) / "metrics.json",
        {"ckpt": str(checkpoint.path), "step": checkpoint.step, **settings, "metrics": metrics},
    )
    _print(metrics, checkpoint, Path(config.out))
    return metrics


def _pictures(images: torch.Tensor, scores: dict, datamodule, out: Path) -> None:
    """`samples.png`; and `nearest.png`, samples beside the training images that come nearest, where that is scored."""
    shown = images[:100]
    pictures.save(pictures.grid(shown, 10, pictures.scale_for(images.shape[-1])), out / "samples.png")
    for score in scores.values():
        if isinstance(score, NearestTrainingDistance):
            training = torch.cat([batch["pixels"][:, :, 0] for batch in datamodule.split_dataloader("train")])
            pairs = torch.cat([images[:20], training[score.neighbours()[:20].cpu()]])
            pictures.save(pictures.grid(pairs, 20, 2), out / "nearest.png")


def _print(metrics: dict[str, float], checkpoint: Checkpoint, out: Path) -> None:
    table = Table(title=f"{checkpoint.path} (step {checkpoint.step})")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, str(value) if isinstance(value, int) else f"{value:.4f}")
    Console().print(table)
    log.info("written: %s", out / "metrics.json")


if __name__ == "__main__":
    main()
