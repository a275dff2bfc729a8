"""Clips from shards of videos, for tokenizers of images and video."""

from collections.abc import Sequence
from typing import Any

from grn.data.clips import ClipDecoder
from grn.data.datamodule import ShardsDataModule
from grn.runtime.errors import UserError, check_count


class VideoShardsDataModule(ShardsDataModule):
    """Clips from webdataset shards of videos (`key.mp4` or another of `VIDEO_SUFFIXES`, `key.txt` or `key.json`).

    Batches are {"pixels": uint8 [B, 3, T, H, W], "label": int64 [B] (with `num_labels`), "caption": list[str] (where
    there are any), "key": list[str]}.

    Args:
        image_size: height and width of the clips, in pixels; frames are cropped as images are.
        frames: T.
        fps: frame rates that training draws from; evaluation takes the highest that fits.
        flip: mirror training clips at random.
        shards: as `ShardsDataModule` has them.
    """

    def __init__(self, *, image_size: int, frames: int, fps: Sequence[float], flip: bool = False, **shards: Any):
        super().__init__(**shards)
        check_count(f"{self.key}.image_size", image_size)
        check_count(f"{self.key}.frames", frames)
        if min(fps, default=0) <= 0:
            raise UserError(f"{self.key}.fps={list(fps)} must be positive")
        self.image_size, self.frames, self.fps, self.flip = image_size, frames, tuple(fps), flip

    def decoder(self, *, training: bool) -> ClipDecoder:
        return ClipDecoder(
            image_size=self.image_size,
            frames=self.frames,
            fps=self.fps,
            training=training,
            flip=self.flip,
            num_labels=self.num_labels,
            seed=self.seed,
        )
