"""Feeds samples or reconstructions to the configured scores."""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grn.data.datamodule import SPLITS
from grn.data.samples import key_id
from grn.media.pixels import from_uint8, to_uint8
from grn.method.sampler import Sampler, Step
from grn.metrics.quantization import QuantizationScores
from grn.metrics.ranks import Totals
from grn.metrics.reconstruction import LPIPSScore, ReconstructionScores, TemporalPSNR
from grn.metrics.splits import Split, as_images, of_kind
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError, check_count
from grn.runtime.ranks import gather, together
from grn.sampling.bundle import RefinerBundle
from grn.sampling.generation import Batch, generate
from grn.sampling.request import Request

log = logging.getLogger(__name__)


def real_splits(datamodule: Any, *, clips: bool | None = None) -> dict[str, Split]:
    """The splits "train" and "val" of the data, as scores read them.

    Args:
        clips: whether they will be compared with clips, so that images among these do not count; False: with images,
            so that clips do not, whose many frames would outweigh them; None: with the same data reconstructed.
    """
    if datamodule is not None and not hasattr(datamodule, "split_dataloader"):
        raise UserError(
            f"scores read real data, which {type(datamodule).__name__} does not give: add split_dataloader(split) "
            "(grn.data.contract), or leave them out by scores=none"
        )
    splits = {split: lambda split=split: datamodule.split_dataloader(split) for split in SPLITS}
    if clips is None:
        return splits
    names = {"train": "training", "val": "held-out"}
    return {split: of_kind(read, clips=clips, name=names[split]) for split, read in splits.items()}


def build_scores(
    partials: Mapping[str, Any], splits: Mapping[str, Split], *, device: torch.device, cache_dir: Path
) -> dict[str, Any]:
    """The scores of an instantiated `scores` config (name -> partial), given the splits of the data."""
    return {name: score(**splits, device=device, cache_dir=cache_dir) for name, score in partials.items()}


def check_scores(partials: Mapping[str, Any], num: int | None) -> None:
    """What can be known of a `scores` config before anything is sampled or a split is read.

    Args:
        num: how many samples will be scored; None: not known.

    Raises:
        UserError: files that are not there or are something else, or too few samples for what is asked for.
    """
    for score in partials.values():
        if hasattr(score.func, "check"):
            score.func.check(num, **score.keywords)


def check_num(num: int, num_labels: int, *, key: str = "num") -> None:
    """Raises:
    UserError: not an equal number of samples for each of `num_labels` conditions.
    """
    check_count(key, num)
    if num % num_labels:
        raise UserError(f"{key}={num} is not a multiple of the {num_labels} classes: classes must occur equally often")


def score_samples(
    bundle: RefinerBundle,
    scores: Mapping[str, Any],
    *,
    num: int,
    batch_size: int,
    seed: int,
    sampler: Sampler | None = None,
    prompts: tuple[str, ...] | None = None,
    rank: int = 0,
    world_size: int = 1,
    watch: Callable[[Batch], None] | None = None,
    watch_steps: Callable[[Step], None] | None = None,
) -> tuple[dict[str, float], Tensor]:
    """Samples `num` images, an equal number a class, each rank its share, and scores them all.

    Args:
        prompts: of a refiner of texts; None: its run's own.
        watch: is shown every batch of this rank; no image is kept here.
        watch_steps: is called after every step of the sampler, as in `generate`.

    Returns:
        The metrics of all scores and `steps_mean`, `steps_min`, `steps_max`; and int64 [classes, most steps + 1] (CPU),
        how many images of each class took so many steps. The same on every rank.

    Raises:
        UserError: `num` is not a multiple of the number of classes, or another rank failed.
    """
    num_labels = bundle.num_conditions if prompts is None else len(prompts)
    check_num(num, num_labels)
    for score in scores.values():
        score.reset()
    most = (sampler or bundle.sampler).schedule.max_steps
    steps = Totals(num_labels, most + 1, dtype=torch.int64).to(bundle.device)
    with together():
        for batch in generate(
            bundle,
            Request(num=num, seed=seed, sampler=sampler, prompts=prompts),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            watch=watch_steps,
        ):
            if scores:
                _update(scores.values(), batch.pixels, batch.labels.to(batch.pixels.device), batch.ids)
            taken = torch.bincount(batch.labels * (most + 1) + batch.refined.steps, minlength=num_labels * (most + 1))
            steps.update(taken.view(num_labels, most + 1))
            if watch is not None:
                watch(batch)
    steps = steps.compute().cpu()
    metrics = {key: value for score in scores.values() for key, value in score.compute().items()}
    seen = torch.nonzero(steps.sum(dim=0)).squeeze(1)
    metrics |= {
        "steps_mean": (steps.sum(dim=0) * torch.arange(most + 1)).sum().item() / num,
        "steps_min": seen.min().item(),
        "steps_max": seen.max().item(),
    }
    return metrics, steps


def uncertainties(scores: Iterable[Any]) -> dict[str, float]:
    """Half the width of 95 % confidence intervals of metrics, by their names, of the scores that know them: those with
    a method `uncertainty`, after `compute`."""
    return {
        key: round(float(value), 6)
        for score in scores
        if hasattr(score, "uncertainty")
        for key, value in score.uncertainty().items()
    }


def steps_by_class(steps: Tensor) -> list[float]:
    """The mean number of steps of each class, out of the counts of `score_samples`."""
    counts = steps.double()
    return (counts @ torch.arange(steps.shape[1], dtype=torch.float64) / counts.sum(dim=1)).tolist()


def _update(scores: Iterable[Any], pixels: Tensor, labels: Tensor | None, ids: Tensor) -> None:
    """Scores that read clips (`reads_clips`) get them whole, others their frames as images."""
    frames = pixels.shape[2]
    for score in scores:
        if _reads_clips(score):
            score.update(pixels, labels, ids)
        else:
            of_frames = None if labels is None else labels.repeat_interleave(frames)
            score.update(as_images(pixels), of_frames, ids.repeat_interleave(frames))


def _reads_clips(score: Any) -> bool:
    return getattr(score, "reads_clips", False)


@torch.no_grad()
def score_reconstructions(
    tokenizer: HBQTokenizer,
    scores: Mapping[str, Any],
    datamodule: Any,
    advance: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Reconstructs the held-out split, images or clips, and tells what each round of HBQ is worth.

    Each rank of a process group takes its share, and gets the metrics of all.

    Returns:
        PSNR, SSIM and L1; of clips, `temporal_psnr`; LPIPS where `scores` has it; every other score of the
        reconstructions as `r<name>` (rFID; of clips alone rFVD); `QuantizationScores`; and `bits_per_image` (of a clip,
        all of it).
    """
    device = next(tokenizer.parameters()).device
    temporal = TemporalPSNR(device=device)
    of_pairs = [ReconstructionScores(device=device)]
    of_pairs += [score for score in scores.values() if isinstance(score, LPIPSScore)]
    alone = {name: score for name, score in scores.items() if not isinstance(score, LPIPSScore)}
    of_images = [score for score in alone.values() if not _reads_clips(score)]
    quantization = QuantizationScores(tokenizer.latent_channels, tokenizer.rounds).to(device)
    bits = 0
    with together():
        for batch in datamodule.split_dataloader("val", share=True):
            pixels = batch["pixels"].to(device)
            reconstruction, features = tokenizer(from_uint8(pixels))
            reconstruction = to_uint8(reconstruction)
            temporal.update(pixels, reconstruction)
            real, reconstructed = as_images(pixels), as_images(reconstruction)
            for score in of_pairs:
                score.update(real, reconstructed)
            labels = batch["label"].to(device) if "label" in batch else None
            ids = torch.tensor([key_id(key) for key in batch["key"]])
            _update(of_images if pixels.shape[2] == 1 else alone.values(), reconstruction, labels, ids)
            quantization.update(features)
            bits = features[0].numel() * tokenizer.rounds
            if advance is not None:
                advance(len(pixels))
    metrics = {key: value for score in (*of_pairs, temporal) for key, value in score.compute().items()}
    if "temporal_psnr" not in metrics:  # the same on every rank
        if left_out := [name for name, score in alone.items() if _reads_clips(score)]:
            log.warning("scores.%s reads clips, and there are images alone: left out", ", scores.".join(left_out))
        alone = {name: score for name, score in alone.items() if not _reads_clips(score)}
    metrics |= {f"r{key}": value for score in alone.values() for key, value in score.compute().items()}
    return metrics | quantization.compute() | {"bits_per_image": max(gather(bits))}
