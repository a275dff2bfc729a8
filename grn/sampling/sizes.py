"""Sizes as people ask for them, by aspect ratio, budget of pixels and seconds, as those that samples have."""

import logging
import math
import re
from fractions import Fraction

from grn.media.mp4 import frame_rate
from grn.method.resolutions import nearest_budget, nearest_template, resolution
from grn.runtime.errors import UserError
from grn.sampling.text_bundle import TextRefinerBundle

log = logging.getLogger(__name__)

ASPECT = re.compile(r"(\d{1,5}(?:\.\d{1,5})?)\s*[:/x]\s*(\d{1,5}(?:\.\d{1,5})?)")


def resolve_size(
    bundle: TextRefinerBundle,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    aspect: str | float | None = None,
    pixels: str | None = None,
    duration: float | None = None,
    fps: float = 16,
    frames_key: str = "frames",
) -> tuple[int | None, int | None, int | None]:
    """(height, width, frames) as a request has them; None stays open. What became of what was asked for is logged.

    Args:
        height, width, frames: as of a request.
        aspect: width to height, `16:9` or a number; None, where `pixels` is given: the bundle's own.
        pixels: one of `grn.method.resolutions.BUDGETS`, `1M`; None, where `aspect` is given: the nearest to the
            bundle's own. The size is that of the nearest template, as in training.
        duration: of clips, seconds at `fps`: the most frames, 1 + 4k of the tokenizer, that start within them.
        frames_key: what the user calls `frames`.

    Raises:
        UserError: a size given twice, no ratio, no budget, or no duration of a clip.
    """
    if aspect is not None or pixels is not None:
        for key, value in (("height", height), ("width", width)):
            if value is not None:
                other = f"aspect={aspect}" if aspect is not None else f"pixels={pixels}"
                raise UserError(f"{key}={value} and {other}: give height and width, or aspect and pixels")
        ratio = bundle.size[1] / bundle.size[0] if aspect is None else _ratio(aspect)
        budget = nearest_budget(*bundle.size) if pixels is None else str(pixels)
        height, width = resolution(nearest_template(1.0, ratio), budget, key="pixels")
        log.info("aspect=%s pixels=%s: %d high and %d wide", aspect or f"{ratio:.3g}", budget, height, width)
    if duration is not None:
        if frames is not None:
            raise UserError(f"{frames_key}={frames} and duration={duration}: give one of them")
        if type(duration) not in (int, float) or not 0 < duration < math.inf:
            raise UserError(f"duration={duration}: seconds, a number above 0")
        stride = bundle.tokenizer.temporal_stride
        rate = frame_rate(fps)
        frames = 1 + int(Fraction(duration).limit_denominator(10**6) * rate) // stride * stride
        if frames == 1:
            least = math.ceil(100 * stride / rate) / 100
            raise UserError(f"duration={duration} is too short for a clip at fps={fps:g}: at least {least:g}")
        log.info("duration=%s at fps=%g: %d frames", duration, fps, frames)
    return height, width, frames


def _ratio(aspect: str | float) -> float:
    """Width to height."""
    match = ASPECT.fullmatch(str(aspect).strip())
    try:
        ratio = float(match[1]) / float(match[2]) if match else float(aspect)
    except (TypeError, ValueError, ZeroDivisionError):
        ratio = 0.0
    if not 0.01 <= ratio <= 100:
        raise UserError(f"aspect={aspect}: width to height, such as 16:9, 1:1 or 1.5")
    return ratio
