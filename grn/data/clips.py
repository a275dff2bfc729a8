"""Clips of the samples in shards, decoded to tensors."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from types import NoneType

import torch

from grn.data.samples import entry, is_mirrored, read_annotation, read_metadata
from grn.media.images import VIDEO_SUFFIXES
from grn.media.skips import Reason, Skip
from grn.media.video import (
    MAX_DECODED_FRAMES,
    MAX_FRAME_PIXELS,
    choose_times,
    duration,
    frames_from,
    open_video,
    resample,
    timed,
    to_picture,
)


@dataclass(frozen=True)
class ClipDecoder:
    """Raw webdataset sample -> one clip with its label, caption and key (a callable for `ShardDataset`).

    It lies in the part of the video that `key.json` tells of, if it does (`read_section`).

    Args:
        image_size: height and width of what comes out, in pixels; frames are brought to it by `center_crop`.
        frames: T.
        fps: frame rates to choose from; those at which the video, or its part, is too short for T frames do not count.
        training: frame rate and start are drawn from (seed, pass, key) alone; else the clip has the highest rate and
            lies in the middle.
        flip: mirror every other clip in training, by a draw that depends on (seed, pass, key) alone.
        seed: the run's seed.
        num_labels: labels lie in [0, num_labels); None for data without labels.
        max_pixels: videos with larger frames are skipped before these are decoded.
        max_decoded_frames: videos are skipped that need more for one clip, from the keyframe before it to its end.
    """

    image_size: int
    frames: int
    fps: tuple[float, ...]
    training: bool = False
    flip: bool = False
    seed: int = 0
    num_labels: int | None = None
    max_pixels: int = MAX_FRAME_PIXELS
    max_decoded_frames: int = MAX_DECODED_FRAMES

    def __call__(self, raw: Mapping[str, object], pass_number: int) -> dict:
        """-> {"pixels": uint8 [3, T, size, size], "label": int (with num_labels), "caption": str or None, "key": str}.

        Raises:
            Skip: with the reason.
        """
        sample, key = read_annotation(raw, self.num_labels), raw["__key__"]
        (data, suffix), (begin, end) = video_entry(raw), read_section(raw)
        draws = random.Random(f"clip/{self.seed}/{pass_number}/{key}") if self.training else None
        with open_video(data, suffix, max_pixels=self.max_pixels) as video:
            mirrored = self.training and self.flip and is_mirrored(self.seed, pass_number, key)
            picture = partial(to_picture, video=video, size=self.image_size, mirrored=mirrored)
            seconds = duration(video)
            times = choose_times(begin, min(seconds, end or seconds), self.frames, self.fps, draws)
            frames = timed(frames_from(video, times[0], max_decoded_frames=self.max_decoded_frames), video)
            sample["pixels"] = torch.cat(resample(frames, times, picture), dim=1)
        return sample


def video_entry(raw: Mapping[str, object]) -> tuple[bytes, str]:
    """The bytes of the video, and its suffix."""
    for suffix in VIDEO_SUFFIXES:
        if (data := entry(raw, (suffix,))) is not None:
            return data, suffix
    raise Skip(Reason.NO_VIDEO)


def read_section(raw: Mapping[str, object]) -> tuple[Fraction, Fraction | None]:
    """(begin, end) in seconds of the part of the video that a sample is; None: to the end.

    `key.json` has it in frames at `fps`: from `begin_frame_id` to `end_frame_id`, which is not part of it.

    Raises:
        Skip: frames without the `fps` to count them by, or numbers that make no part.
    """
    metadata = read_metadata(raw)
    begin, end, fps = (metadata.get(name) for name in ("begin_frame_id", "end_frame_id", "fps"))
    if begin is None and end is None:
        return Fraction(0), None
    begin = 0 if begin is None else begin
    if type(begin) is not int or type(end) not in (int, NoneType) or fps is None or type(fps) not in (int, float):
        raise Skip(Reason.BAD_SECTION)
    if not 0 < fps < 1e6 or not 0 <= begin < (2**40 if end is None else end) <= 2**40:
        raise Skip(Reason.BAD_SECTION)
    return begin / Fraction(fps), None if end is None else end / Fraction(fps)
