"""Image to video and continuation of clips: the given frames as a `Start`."""

import logging
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import TypeIs

from grn.data.prepare.clip_lists import map_file
from grn.data.prepare.folders import suffix_of
from grn.media.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, cover_and_crop, resize_and_crop, to_rgb, to_tensor
from grn.media.mp4 import frame_rate
from grn.media.skips import Skip
from grn.media.video import (
    MAX_DECODED_FRAMES,
    MAX_FRAME_PIXELS,
    duration,
    frames_from,
    open_video,
    resample,
    timed,
)
from grn.runtime.errors import UserError
from grn.sampling.bundle import RefinerBundle
from grn.sampling.refinement import Start
from grn.sampling.start_image import read_image, start_from_image
from grn.sampling.text_bundle import TextRefinerBundle

log = logging.getLogger(__name__)

Picture = str | Path | Image.Image
Init = Picture | Sequence[Picture]


def start_from(
    bundle: RefinerBundle,
    init: Init | None,
    *,
    shape: tuple[int, int, int, int],
    strength: float | None = None,
    mask: str | Path | Image.Image | None = None,
    frames: int | None = None,
    fps: float = 16,
    names: tuple[str, str] = ("init", "mask"),
    started: bool = False,
) -> Start | None:
    """What samples start from: `start_from_clip` where they are clips, else `start_from_image`; None without `init`.

    Args:
        shape: (D, T, h, w) of the samples, in tokens (`RefinerBundle.shape_of`).
        names: what the user calls `init` and `mask`.
        started: whether samples start from something else than `init`.

    Raises:
        UserError: as these do; something that is not for the other kind; no such `fps`.
    """
    frame_rate(fps)
    if init is None and not started and shape[1] > 1 and goes_on_from_frame(bundle):
        raise UserError(f"{names[0]}: these weights make clips of a first frame (image to video): give {names[0]}")
    if init is None or shape[1] == 1 or not isinstance(bundle, TextRefinerBundle):
        if frames is not None:
            raise UserError(
                f"init_frames={frames} is of clips that go on from {names[0]}=clip.mp4: give that, and frames=..."
            )
        if _is_several(init):
            raise UserError(f"{names[0]}: several pictures are for clips to go on from: give one, or frames=...")
        return start_from_image(bundle, init, shape=shape, strength=strength, mask=mask, names=names)
    for key, value in ((names[1], mask), ("strength", strength)):
        if value is not None:
            raise UserError(f"{key}={value}: clips go on from {names[0]} as it is: leave {key} out")
    return start_from_clip(bundle, init, shape=shape, frames=frames, fps=fps, name=names[0])


def start_from_clip(
    bundle: TextRefinerBundle,
    init: Init,
    *,
    shape: tuple[int, int, int, int],
    frames: int | None = None,
    fps: float = 16,
    name: str = "init",
) -> Start:
    """One map, B = 1, on the bundle's device, whose first latents are those of the given pictures; others are drawn.

    Args:
        init: a PNG, JPEG or WebP, a video (mp4, mov, webm, mkv), a picture of Pillow's, or a list of pictures: brought
            to the size of the samples as training data are, for the authors' weights as they bring them there.
        shape: as of `start_from`.
        frames: how many of them to go on from, 1 + 4k (of the tokenizer), the last ones; None: as many as there are, of
            a kind that the refiner was trained to go on from.
        fps: of the samples, as `frame_rate` has it; videos are resampled to it.

    Raises:
        UserError: a file that cannot be used; fewer frames in it, or a number of frames that leaves none to draw; no
            such `fps`.
    """
    rate = frame_rate(fps)  # beyond `open_video`, which takes any exception for the file's fault
    stride, (_, latents, rows, columns) = bundle.tokenizer.temporal_stride, shape
    if frames is None:
        most = 1 + stride * (min(max(1, bundle.context_latents), latents - 1) - 1)
    elif type(frames) is not int or frames < 1 or (frames - 1) % stride:
        raise UserError(f"init_frames={frames} must be 1 + {stride}*k, what latents are of")
    elif (most := frames) > 1 + stride * (latents - 2):
        raise UserError(
            f"init_frames={frames} leaves nothing to draw of frames={1 + stride * (latents - 1)}: give fewer, or more "
            "frames"
        )
    sides = rows * bundle.tokenizer.stride, columns * bundle.tokenizer.stride

    fit = cover_and_crop if goes_on_from_frame(bundle) else resize_and_crop

    def fitted(picture: Image.Image) -> Tensor:
        return to_tensor(fit(picture, *sides))

    suffix = suffix_of(init) if isinstance(init, (str, Path)) else None
    if suffix is not None and suffix not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        raise UserError(f"{name}={init}: give one of {', '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)}")
    try:
        if isinstance(init, str | Path) and suffix in VIDEO_SUFFIXES:
            pictures = _last_frames(Path(init).expanduser(), most, rate, fitted, name)
        else:
            images = list(init) if _is_several(init) else [init]
            pictures = [fitted(to_rgb(read_image(name, image))) for image in images[-most:]]
    except Skip as skip:
        raise UserError(f"{name}={init}: {skip}") from None
    if not pictures or (frames is not None and len(pictures) < frames):
        raise UserError(f"init_frames={most}: {name} has {len(pictures)} frames at fps={fps:g}")
    pixels = torch.cat(pictures[(len(pictures) - 1) % stride :], dim=1)
    tokens = bundle.tokenize(pixels[None].to(bundle.device))
    if (given := tokens.shape[2]) > bundle.context_latents:
        log.warning(
            "init gives %d latents, but training gave %d (training.context_latents): clips may not go on well from it",
            given,
            bundle.context_latents,
        )
    redraw = torch.arange(latents, device=tokens.device) >= given
    return Start(
        F.pad(tokens, (0, 0, 0, 0, 0, latents - given)),
        1.0,
        redraw[None, None, :, None, None].expand(1, 1, -1, rows, columns),
    )


def goes_on_from_frame(bundle: RefinerBundle) -> bool:
    """Whether a bundle is the authors' of image to video, whose prompts' tag promises a first frame."""
    return bundle.provenance.get("refiner", {}).get("task") == "i2v"


def _is_several(init: Init | None) -> TypeIs[Sequence[Picture]]:
    return isinstance(init, Sequence) and not isinstance(init, str | bytes)


def _last_frames(
    path: Path, most: int, rate: Fraction, fitted: Callable[[Image.Image], Tensor], name: str
) -> list[Tensor]:
    """Of a video, each uint8 [3, 1, H, W]; of the file, no more is read than its index and its end.

    Raises:
        Skip, UserError: what is wrong with it.
    """
    if not path.is_file():
        raise UserError(f"{name}={path}: there is no such file")
    with open_video(map_file(path), suffix_of(path), max_pixels=MAX_FRAME_PIXELS) as video:
        end = duration(video)
        count = max(1, min(most, int(end * rate)))
        times = [max(Fraction(0), end - (count - number) / rate) for number in range(count)]
        frames = timed(frames_from(video, times[0], max_decoded_frames=MAX_DECODED_FRAMES), video)
        return resample(frames, times, lambda frame: fitted(video.to_rgb(frame)))
