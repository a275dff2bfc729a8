"""Frechet video distance (Unterthiner et al., arXiv 1812.01717): FID's statistics, of features of clips."""

import logging
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from grn.metrics.features import FeatureStatistics
from grn.metrics.fid import Statistics, as_numpy, frechet_distance, load_statistics, split_statistics
from grn.metrics.splits import Split, same_sizes
from grn.metrics.video_networks import I3D, TorchvisionVideo
from grn.runtime.errors import UserError

log = logging.getLogger(__name__)


class FrechetVideoDistance:
    """`fvd`: the Frechet distance of generated clips from real ones, in the features of a video network.

    It does not depend on how the clips are cut into batches or dealt to ranks, but for the last bits of the network's
    float32. It depends on the number of frames and of clips, and on the network: compare like with like.

    Args:
        train, val: the splits (`grn.metrics.splits`), of clips; of one size [B, 3, T, H, W], or in lists.
        device: where the network runs and the sums are kept; it must have float64.
        cache_dir: where the statistics of a split are kept; None keeps them in memory.
        network: makes the network (`grn.metrics.video_networks.video_network`).
        reference: path of an npz with `mu` [width] and `sigma` [width, width], or the split `train` or `val`.
        frames: how many of a clip count, from its first on. Real clips that are shorter are left out, and so are
            images among them.

    Raises:
        UserError: naming the key, for a network that cannot be had or needs more frames.
    """

    reads_clips: ClassVar = True

    def __init__(
        self,
        *,
        train: Split,
        val: Split,
        device: torch.device | str = "cpu",
        cache_dir: str | Path | None = None,
        network: Callable[[], I3D | TorchvisionVideo],
        reference: str | Path = "train",
        frames: int = 16,
    ):
        self.network, self.frames = network().to(device), frames
        if frames < self.network.min_frames:
            raise UserError(f"scores.fvd.frames={frames}: the network reads {self.network.min_frames} or more")
        self.splits: dict[Any, tuple[Split, str]] = {"train": (train, "training"), "val": (val, "held-out")}
        self.reference_name, self.cache_dir = reference, cache_dir
        try:
            width = self._features(torch.zeros(1, 3, frames, 32, 32, dtype=torch.uint8, device=device)).shape[1]
        except (RuntimeError, IndexError, AttributeError) as error:
            raise UserError(
                f"scores.fvd.network: it makes no features [1, width] of a clip of {frames} frames "
                f"({type(error).__name__}): is its file another network's?"
            ) from error
        self.statistics = FeatureStatistics(width).to(device)

    @classmethod
    def check(cls, num: int | None, *, reference: str | Path = "train", **arguments: Any) -> None:
        """As `GenerationScores.check`."""
        score = cls(train=tuple, val=tuple, reference=reference, **arguments)
        if reference not in score.splits:
            _ = score.reference
        if num is not None and num < 2:
            raise UserError(f"scores.fvd needs at least 2 clips, got {num}")

    def update(self, clips: Tensor, labels: Tensor | None = None, ids: Tensor | None = None) -> None:
        """Adds generated clips uint8 [B, 3, T, H, W]; labels and ids are not read.

        Raises:
            UserError: they are shorter than `frames`; with the first ones, whatever is wrong with the reference.
        """
        if clips.shape[2] < self.frames:
            raise UserError(
                f"scores.fvd.frames={self.frames}, but clips have {clips.shape[2]} frames: give fewer (the network "
                f"reads {self.network.min_frames} or more), or leave the score out"
            )
        _ = self.reference  # now, not when all are there
        self.statistics.update(self._features(clips[:, :, : self.frames]))

    def compute(self) -> dict[str, float]:
        """The score of all clips given since the last `reset`, over all ranks; every rank must call it.

        Raises:
            UserError: fewer than two clips, or as `update`.
        """
        sums = self.statistics.compute()
        if (n := int(sums["n"])) < 2:
            raise UserError(f"scores.fvd needs at least 2 clips, got {n}")
        return {"fvd": frechet_distance(as_numpy(sums), self.reference)}

    def reset(self) -> None:
        """Forgets the generated clips; the reference stays."""
        self.statistics.reset()

    @cached_property
    def reference(self) -> Statistics:
        """Of the real clips; read when the first clips come, as there may be none, of a data set of images.

        Raises:
            UserError: they cannot be had, or the split has fewer than two clips of `frames` frames.
        """
        if self.reference_name not in self.splits:
            return load_statistics(self.reference_name, len(self.statistics.sum), score="fvd")
        split, name = self.splits[self.reference_name]
        return split_statistics(
            lambda: clip_batches(split, self.frames, name=name),
            self._features,
            like=self.statistics,
            identity=self.network.identity,
            cache_dir=self.cache_dir,
            score="fvd",
            name=name,
        )

    @torch.no_grad()
    def _features(self, clips: Tensor) -> Tensor:
        """uint8 [B, 3, T, H, W] -> float32 [B, width], in the network's own precision, also under autocast."""
        device = next(self.network.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return self.network(clips.to(device))


def clip_batches(split: Split, frames: int, *, name: str) -> Iterator[Tensor]:
    """The first frames of the clips of a split that are long enough, in its order: uint8 [B, 3, frames, H, W].

    Raises:
        UserError: there are none.
    """
    found = short = longest = 0
    for batch in split():
        long = []
        for clip in batch["pixels"]:
            longest = max(longest, clip.shape[1])
            if clip.shape[1] >= frames:
                long.append(clip[:, :frames])
        found, short = found + len(long), short + len(batch["pixels"]) - len(long)
        yield from same_sizes(long)
    if not found:
        raise UserError(
            f"scores.fvd: no clip of the {name} split has scores.fvd.frames={frames} frames, the longest has {longest}"
        )
    if short:
        log.warning("scores.fvd: %d of %d clips are shorter than %d frames: left out", short, found + short, frames)
