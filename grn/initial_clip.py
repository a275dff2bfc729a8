"""Pictures that clips go on from: image to video and continuation, by `Start` (DESIGN 1.5)."""

import logging
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from grn.data.clip_lists import map_file
from grn.data.clips import (
    MAX_DECODED_FRAMES,
    MAX_FRAME_PIXELS,
    duration,
    frames_from,
    open_video,
    resample,
    timed,
)
from grn.data.folders import suffix_of
from grn.data.samples import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Skip, resize_and_crop, to_tensor
from grn.errors import UserError
from grn.initial_image import read_image, start_from_image
from grn.mp4 import frame_rate
from grn.sampler import Start
from grn.training import RefinerModule, TextRefinerModule

log = logging.getLogger(__name__)

Init = str | Path | Image.Image | Sequence[str | Path | Image.Image]


def start_from(
    module: RefinerModule,
    init: Init | None,
    *,
    strength: float | None = None,
    mask: str | Path | Image.Image | None = None,
    frames: int | None = None,
    fps: float = 16,
) -> Start | None:
    """What samples start from: `start_from_clip` where they are clips, else `start_from_image`; None without `init`.

    Raises:
        UserError: as these do; something that is not for the other kind; no such `fps`.
    """
    frame_rate(fps)
    if init is None or module.token_shape[1] == 1:
        if frames is not None:
            raise UserError(
                f"init_frames={frames} is of clips that go on from init=clip.mp4: give that, and frames=..."
            )
        if _is_several(init):
            raise UserError("init: several pictures are for clips to go on from: give one, or frames=...")
        return start_from_image(module, init, strength=strength, mask=mask)
    for key, value in (("mask", mask), ("strength", strength)):
        if value is not None:
            raise UserError(f"{key}={value}: clips go on from init as it is: leave {key} out")
    return start_from_clip(module, init, frames=frames, fps=fps)


def start_from_clip(module: TextRefinerModule, init: Init, *, frames: int | None = None, fps: float = 16) -> Start:
    """One map, B = 1, on the module's device, whose first latents are those of the given pictures; others are drawn.

    Args:
        init: a PNG, JPEG or WebP, a video (mp4, mov, webm, mkv), a picture of Pillow's, or a list of pictures: brought
            to the size of the samples as training data are.
        frames: how many of them to go on from, 1 + 4k (of the tokenizer), the last ones; None: as many as there are, of
            a kind that the refiner was trained to go on from.
        fps: of the samples, as `frame_rate` has it; videos are resampled to it.

    Raises:
        UserError: a file that cannot be used; fewer frames in it, or a number of frames that leaves none to draw; no
            such `fps`.
    """
    rate = frame_rate(fps)  # beyond `open_video`, which takes any exception for the file's fault
    stride, (_, latents, rows, columns) = module.tokenizer.temporal_stride, module.token_shape
    if frames is None:
        most = 1 + stride * (min(max(1, module.context_latents), latents - 1) - 1)
    elif type(frames) is not int or frames < 1 or (frames - 1) % stride:
        raise UserError(f"init_frames={frames} must be 1 + {stride}*k, what latents are of")
    elif (most := frames) > 1 + stride * (latents - 2):
        raise UserError(
            f"init_frames={frames} leaves nothing to draw of frames={module.frames}: give fewer, or more frames"
        )
    sides = rows * module.tokenizer.stride, columns * module.tokenizer.stride

    def fitted(picture: Image.Image) -> Tensor:
        return to_tensor(resize_and_crop(picture, *sides))

    suffix = suffix_of(init) if isinstance(init, (str, Path)) else None
    if suffix is not None and suffix not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        raise UserError(f"init={init}: give one of {', '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)}")
    try:
        if suffix in VIDEO_SUFFIXES:
            pictures = _last_frames(Path(init).expanduser(), most, rate, fitted)
        else:
            images = list(init) if _is_several(init) else [init]
            pictures = [fitted(read_image("init", image)) for image in images[-most:]]
    except Skip as skip:
        raise UserError(f"init={init}: {skip}") from None
    if not pictures or (frames is not None and len(pictures) < frames):
        raise UserError(f"init_frames={most}: init has {len(pictures)} frames at fps={fps:g}")
    pixels = torch.cat(pictures[(len(pictures) - 1) % stride :], dim=1)
    tokens = torch.stack(module.tokenize({"pixels": [pixels.to(module.device)]}))
    if (given := tokens.shape[2]) > module.context_latents:
        log.warning(
            "init gives %d latents, but training gave %d (training.context_latents): clips may not go on well from it",
            given,
            module.context_latents,
        )
    redraw = torch.arange(latents, device=tokens.device) >= given
    return Start(
        F.pad(tokens, (0, 0, 0, 0, 0, latents - given)),
        1.0,
        redraw[None, None, :, None, None].expand(1, 1, -1, rows, columns),
    )


def given_latents(start: Start | None) -> int:
    """How many first latents clips from `start` have as they were given: 0 without one."""
    return 0 if start is None else int((~start.redraw[0, 0]).flatten(1).all(dim=1).sum())


def _is_several(init: object) -> bool:
    return isinstance(init, Sequence) and not isinstance(init, (str, bytes))


def _last_frames(path: Path, most: int, rate: Fraction, fitted: Callable[[Image.Image], Tensor]) -> list[Tensor]:
    """Of a video, each uint8 [3, 1, H, W]; of the file, no more is read than its index and its end.

    Raises:
        Skip, UserError: what is wrong with it.
    """
    if not path.is_file():
        raise UserError(f"init={path}: there is no such file")
    with open_video(map_file(path), suffix_of(path), max_pixels=MAX_FRAME_PIXELS) as video:
        end = duration(video)
        count = max(1, min(most, int(end * rate)))
        times = [max(Fraction(0), end - (count - number) / rate) for number in range(count)]
        frames = timed(frames_from(video, times[0], max_decoded_frames=MAX_DECODED_FRAMES), video)
        return resample(frames, times, lambda frame: fitted(video.to_rgb(frame)))
