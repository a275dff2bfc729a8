"""Packs of captioned clips of many shapes and lengths, and of images: data of text to video."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import torch
from PIL import ImageOps
from torch import Tensor

from grn.data.clips import read_section, video_entry
from grn.data.samples import is_mirrored
from grn.data.text_images import PackedTokens, TextImageDataModule, TextImageDecoder
from grn.media.images import VIDEO_SUFFIXES, resize_and_crop, to_tensor
from grn.media.skips import Reason, Skip
from grn.media.video import (
    MAX_DECODED_FRAMES,
    MAX_FRAME_PIXELS,
    Video,
    duration,
    frames_from,
    open_video,
    resample,
    timed,
)
from grn.runtime.errors import UserError


@dataclass(frozen=True)
class TextVideoDecoder:
    """Raw webdataset sample -> one clip in the size of its shape, or an image, and a caption (for `ShardDataset`).

    A clip lasts as many whole buckets, and one frame, as the video has room for, or the part of it that `key.json`
    tells of (`read_section`).

    Args:
        images: decodes what is no video; videos have their captions, sizes and flips from it, too.
        fps: of the clips, by timestamps.
        bucket: seconds.
        max_frames: of a clip, 1 + a number of whole buckets.
        training: the clip lies at random in the video, by a draw of (seed, pass, key) alone; else in its middle.
        max_pixels: videos with larger frames are skipped before these are decoded.
        max_decoded_frames: videos are skipped that need more for one clip, from the keyframe before it to its end.
    """

    images: TextImageDecoder
    fps: Fraction
    bucket: Fraction
    max_frames: int
    training: bool = False
    max_pixels: int = MAX_FRAME_PIXELS
    max_decoded_frames: int = MAX_DECODED_FRAMES

    def __call__(self, raw: Mapping[str, object], pass_number: int) -> dict:
        """-> {"pixels": uint8 [3, T, H, W], "caption": str, "key": str}.

        Raises:
            Skip: with the reason.
        """
        if not any(suffix in raw for suffix in VIDEO_SUFFIXES):
            return self.images(raw, pass_number)
        key, seed = raw["__key__"], self.images.seed
        caption, size_draws = self.images.draw(raw, pass_number)
        (data, suffix), (begin, end) = video_entry(raw), read_section(raw)
        draws = random.Random(f"clip/{seed}/{pass_number}/{key}") if self.training else None
        with open_video(data, suffix, max_pixels=self.max_pixels) as video:
            seconds = duration(video)
            times = self.times(begin, min(seconds, end or seconds), draws)
            frames = timed(frames_from(video, times[0], max_decoded_frames=self.max_decoded_frames), video)
            mirrored = self.images.flip and is_mirrored(seed, pass_number, key)
            picture = _Pictures(video, self.images, size_draws, mirrored=mirrored)
            pixels = torch.cat(resample(frames, times, picture), dim=1)
        return {"pixels": pixels, "caption": caption, "key": key}

    def times(self, begin: Fraction, end: Fraction, draws: random.Random | None) -> list[Fraction]:
        """The moments whose pictures make a clip out of what lies between `begin` and `end`, in seconds.

        Raises:
            Skip: that is less than a bucket and a frame.
        """
        buckets = min(math.ceil((end - begin) / self.bucket) - 1, (self.max_frames - 1) // (self.bucket * self.fps))
        if buckets < 1:
            raise Skip(Reason.CLIP_TOO_SHORT)
        place = Fraction(draws.random()) if draws else Fraction(1, 2)
        start = begin + place * (end - begin - buckets * self.bucket)
        return [start + k / self.fps for k in range(1 + int(buckets * self.bucket * self.fps))]


class _Pictures:
    """Frames -> uint8 [3, 1, H, W], all in the size that the first one has by its shape."""

    def __init__(self, video: Video, images: TextImageDecoder, draws: random.Random, *, mirrored: bool):
        self.video, self.images, self.draws, self.mirrored = video, images, draws, mirrored
        self.size: tuple[int, int] | None = None

    def __call__(self, frame: av.VideoFrame) -> Tensor:
        image = self.video.to_rgb(frame)
        if self.size is None:
            self.size = self.images.size_of(image, self.draws)
        image = resize_and_crop(image, *self.size, max_pixels=self.video.max_pixels)
        return to_tensor(ImageOps.mirror(image) if self.mirrored else image)


class TextVideoDataModule(TextImageDataModule):
    """Captioned clips from webdataset shards (`key.mp4` or another of `VIDEO_SUFFIXES`, `key.txt`, `key.json`), each in
    the size of `pixels` that is nearest to its shape, packed without padding; captioned images may stand among them.

    Args:
        fps: frames a second; videos of other rates are resampled by their timestamps.
        bucket: seconds; a clip lasts a whole number of these, and one frame.
        max_frames: of a clip, 1 + the frames of whole buckets.
        images: as `TextImageDataModule` has them.
    """

    def __init__(self, *, fps: float = 16, bucket: float = 0.25, max_frames: int = 209, **images: Any):
        super().__init__(**images)
        if fps <= 0 or bucket <= 0:
            raise UserError(f"{self.key}.fps={fps} and {self.key}.bucket={bucket} must be positive")
        self.fps, self.bucket, self.max_frames = Fraction(fps), Fraction(bucket), max_frames
        if (self.fps * self.bucket).denominator > 1:
            raise UserError(f"{self.key}.bucket={bucket} seconds are not whole frames at {self.key}.fps={fps}")
        if max_frames < 2 or (max_frames - 1) % self.bucket_frames:
            raise UserError(
                f"{self.key}.max_frames={max_frames} must be 1 + a multiple of the {self.bucket_frames} frames in "
                f"{self.key}.bucket={bucket}"
            )

    @property
    def bucket_frames(self) -> int:
        return int(self.fps * self.bucket)

    def check_packing(self, tokens: PackedTokens) -> None:
        """As of `TextImageDataModule`.

        Raises:
            UserError: the same; buckets that are not multiples of the tokenizer's temporal stride.
        """
        if self.bucket_frames % tokens.temporal_stride:
            raise UserError(
                f"{self.key}.bucket: its {self.bucket_frames} frames are not a multiple of the tokenizer's "
                f"{tokens.temporal_stride} frames a latent"
            )
        super().check_packing(tokens)
        height, width = max((size for _, sizes in self.budgets for _, size in sizes), key=math.prod)
        latent = height * width // tokens.stride**2
        room = (self.max_tokens - 2) // latent  # latents
        if room < 1 + (self.max_frames - 1) // tokens.temporal_stride:
            frames = 1 + (room - 1) * tokens.temporal_stride // self.bucket_frames * self.bucket_frames
            raise UserError(
                f"{self.key}.max_tokens={self.max_tokens} holds no clip of {self.key}.max_frames={self.max_frames} at "
                f"{height}x{width} pixels: give more tokens, fewer pixels, or max_frames={frames}"
            )

    def decoder(self, *, training: bool) -> TextVideoDecoder:
        return TextVideoDecoder(
            images=super().decoder(training=training),
            fps=self.fps,
            bucket=self.bucket,
            max_frames=self.max_frames,
            training=training,
        )
