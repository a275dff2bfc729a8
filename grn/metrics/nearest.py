"""Distance of samples to the nearest training image: detects memorization."""

from pathlib import Path

import torch
from torch import Tensor

from grn.metrics.ranks import Rows
from grn.metrics.splits import Split, grey, image_batches
from grn.runtime.errors import UserError

CHUNK = 4096  # training images compared at a time


class NearestTrainingDistance:
    """Distances to the nearest training image, of generated and of real held-out images.

    The distance is the root mean square over the pixels of the difference of the gray images, in [0, 1]. `compute`
    gives `nn_median_generated`, `nn_median_val`, `nn_median_ratio` (generated over held-out: near 1 where generated
    images are as new as real new ones, 0 where they are training images) and the deciles
    `nn_decile_{1..9}_{generated,val}`. The whole training split is held on `device` (4 bytes a pixel), so it is a
    score for small data.

    Args:
        train, val: the splits (`grn.metrics.splits`), of one image size.
        device: where distances are computed.
        cache_dir: not used.

    Raises:
        UserError: an empty split, images of several sizes, or held-out images that repeat training images.
    """

    def __init__(
        self,
        *,
        train: Split,
        val: Split,
        device: torch.device | str = "cpu",
        cache_dir: str | Path | None = None,
    ):
        batches = [batch.to(device) for batch in image_batches(train, name="training")]
        self.shape = batches[0].shape[1:]
        self.train = torch.cat([self._vectors(batch) for batch in batches])
        self.val_distances = torch.cat(
            [self._nearest(batch.to(device))[0] for batch in image_batches(val, name="held-out")]
        ).cpu()
        if self.val_distances.median() == 0:
            raise UserError("scores.nearest: most held-out images are in the training split: prepare the splits again")
        self._distances = Rows(dtype=torch.float64).to(device)
        self._neighbours = Rows(dtype=torch.int64).to(device)

    def update(self, images: Tensor, labels: Tensor | None = None, ids: Tensor | None = None) -> None:
        """Adds generated images uint8 [B, 3, H, W]; their labels are not read; ids: `Rows.update`."""
        distances, neighbours = self._nearest(images.to(self.train.device))
        self._distances.update(distances, ids)
        self._neighbours.update(neighbours, ids)

    def distances(self) -> Tensor:
        """Distances of the generated images, float64 [N], on the CPU, in their order. Every rank must call it."""
        return self._distances.gathered().cpu()

    def neighbours(self) -> Tensor:
        """Which training image (its place in the split) is the nearest to each generated one: int64 [N], on the CPU.

        Every rank must call it.
        """
        return self._neighbours.gathered().cpu()

    def compute(self) -> dict[str, float]:
        """The scores of all images given since the last `reset`, over all ranks; every rank must call it.

        Raises:
            UserError: no image was given.
        """
        distances = self.distances()
        if not len(distances):
            raise UserError("scores.nearest: no images to compare: generate at least one")
        tenths = torch.arange(1, 10, dtype=torch.float64) / 10
        generated, val = (
            values.quantile(tenths).tolist() for values in (distances, self.val_distances.to(torch.float64))
        )
        scores = {
            "nn_median_generated": generated[4],
            "nn_median_val": val[4],
            "nn_median_ratio": generated[4] / val[4],
        }
        scores |= {f"nn_decile_{tenth}_generated": value for tenth, value in enumerate(generated, start=1)}
        return scores | {f"nn_decile_{tenth}_val": value for tenth, value in enumerate(val, start=1)}

    def reset(self) -> None:
        """Forgets the generated images."""
        self._distances.reset()
        self._neighbours.reset()

    def _vectors(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.shape:
            raise UserError(
                f"scores.nearest: images of {list(images.shape[1:])} cannot be compared with training images of "
                f"{list(self.shape)}: give both the same size"
            )
        return grey(images).flatten(1)

    def _nearest(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Distance float64 [B] and place int64 [B] of each image's nearest training image."""
        vectors = self._vectors(images)
        best = torch.full((len(images),), torch.inf, dtype=torch.float64, device=vectors.device)
        place = torch.zeros(len(images), dtype=torch.int64, device=vectors.device)
        for start in range(0, len(self.train), CHUNK):
            # Differences, not the matrix product: that one finds a copy a distance of 1e-3 away from itself.
            table = torch.cdist(
                vectors, self.train[start : start + CHUNK], compute_mode="donot_use_mm_for_euclid_dist"
            ).to(torch.float64)
            distance, index = table.min(dim=1)
            closer = distance < best
            best, place = torch.where(closer, distance, best), torch.where(closer, index + start, place)
        return best / vectors.shape[1] ** 0.5, place
