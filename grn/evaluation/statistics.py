"""Statistics of real images for `scores.fid.reference`, in the form of ADM's reference batches."""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import Progress
from torch import Tensor

from grn.evaluation.scoring import real_splits
from grn.metrics.features import INCEPTION, FeatureStatistics, SpatialFeatures, build_extractor, extract, widths
from grn.metrics.fid import POOLED, SPATIAL, SPATIAL_WIDTH, as_numpy, default_features
from grn.metrics.reference import images_at
from grn.metrics.splits import as_images, image_batches, same_sizes
from grn.runtime.errors import UserError, check_count
from grn.runtime.files import write_atomically
from grn.runtime.ranks import join, rank_and_world_size, together
from grn.sampling.generation import best_device

log = logging.getLogger(__name__)

FILE = "statistics.npz"


def statistics(config: DictConfig) -> Path:
    """Writes `statistics.npz` into `out`: `mu` and `sigma` of Inception's pooled features, `mu_s` and `sigma_s` of its
    spatial ones, `num`, and `arr_0`, some of the images, where they are asked for. Other extractors have no spatial
    ones. Several processes share the images of a split.

    Raises:
        UserError: naming the key; no data, fewer than two images, or images of several sizes for `arr_0`.
    """
    device = join(best_device(config.device))
    rank, world_size = rank_and_world_size()
    chosen = config.statistics
    with together():
        check_count("statistics.images", chosen.images, least=0)
        layer = default_features(chosen.extractor, "fid")
        extractor = build_extractor(chosen.extractor, [layer], weights=chosen.weights, device=device)
        spatial = SpatialFeatures(extractor) if chosen.extractor == INCEPTION else None
        sums = {POOLED: FeatureStatistics(widths(extractor)[layer]).to(device)}
        if spatial is not None:
            sums[SPATIAL] = FeatureStatistics(SPATIAL_WIDTH).to(device)
        shared, whole = _splits(config)
    with Progress(transient=True, disable=rank > 0) as progress:
        task = progress.add_task("reading real images", total=None)
        for images in shared(rank, world_size):
            sums[POOLED].update(extract(extractor, images)[layer])
            if spatial is not None:
                sums[SPATIAL].update(spatial.take())
            progress.advance(task, len(images))
    found: dict[str, Any] = {}
    for names, state in sums.items():
        computed = state.compute()
        found["num"] = np.int64(computed["n"].item())
        found |= dict(zip(names, as_numpy(computed).values()))
    path = Path(config.out) / FILE
    with together():
        if found["num"] < 2:
            raise UserError(f"statistics need at least 2 images, and there is {found['num']}")
        if rank == 0:
            if chosen.images:
                found["arr_0"] = _first(whole(), chosen.images)
            write_atomically(path, lambda temporary: _save(temporary, found))
            log.info("statistics of %d images: %s", found["num"], path)
    return path


def _splits(config: DictConfig) -> tuple[Callable[[int, int], Iterator[Tensor]], Callable[[], Iterator[Tensor]]]:
    """((rank, world size) -> this rank's images; () -> all images), each an iterator over uint8 [B, 3, H, W]."""
    chosen = config.statistics
    if chosen.folder is not None:
        split = images_at(chosen.folder, key="statistics.folder")

        def part(rank: int, world_size: int) -> Iterator[Tensor]:
            for number, images in enumerate(image_batches(split, name=str(chosen.folder))):
                if number % world_size == rank:
                    yield images

        return part, lambda: image_batches(split, name=str(chosen.folder))
    if "_target_" not in config.data:
        raise UserError("what=statistics reads data: choose data=imagenet, ..., or give statistics.folder=...")
    if chosen.split not in ("train", "val"):
        raise UserError(f"statistics.split={chosen.split} must be train or val")
    datamodule = instantiate(config.data)
    whole = real_splits(datamodule)[chosen.split]

    def share(rank: int, world_size: int) -> Iterator[Tensor]:
        if world_size == 1:
            yield from image_batches(whole, name=chosen.split)
        else:
            for batch in datamodule.split_dataloader(chosen.split, share=True):
                yield from map(as_images, same_sizes(batch["pixels"]))

    return share, lambda: image_batches(whole, name=chosen.split)


def _first(batches: Iterator[Tensor], number: int) -> np.ndarray:
    """The first images, which are in no order of classes, as uint8 [N, H, W, 3]."""
    kept: list[Tensor] = []
    for images in batches:
        if kept and images.shape[1:] != kept[0].shape[1:]:
            raise UserError("statistics.images keeps images of one size, and these have several: give 0")
        kept.append(images[: number - sum(map(len, kept))].cpu())
        if sum(map(len, kept)) == number:
            break
    return torch.cat(kept).permute(0, 2, 3, 1).contiguous().numpy()


def _save(temporary: Path, found: Mapping[str, Any]) -> None:
    with open(temporary, "wb") as file:  # numpy would add a suffix to a path
        np.savez(file, **found)
