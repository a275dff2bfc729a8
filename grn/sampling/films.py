"""Films of a refinement: what each step predicted, and the state of each token."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from grn.media.pictures import BAR, GROUND, INK, STATE_COLOURS, step_grid
from grn.sampling.recording import STATES, Recording

FILM_CAPTION = 24


def film(
    recording: Recording,
    decode: Callable[[Tensor], Iterable[Tensor]],
    *,
    states: bool = True,
    columns: int | None = None,
) -> list[Image.Image]:
    """A refinement as pictures: the decoded noise it starts from, then the prediction of each step.

    Below stand the step, the signal ratio t and the mean entropy of all samples, and a bar that grows with t.

    Args:
        decode: int64 tokens [B, D, T, h, w] (CPU) -> frames, uint8 [B, 3, H, W] each, of which the last is shown.
        states: show the `STATES` of the tokens beside each prediction.
        columns: of the grid of samples.
    """

    def shown(tokens: Tensor) -> Tensor:
        (last,) = deque(decode(recording.with_prefix(tokens)), maxlen=1)
        return last.cpu()

    first, frames = recording.moments[0], []
    for moment in (None, *recording.moments):
        pixels = shown(first.seen if moment is None else moment.predicted)
        if states:
            blank = torch.full_like(first.states, STATES.index("blank"))
            drawn = state_pixels(blank if moment is None else moment.states, pixels.shape[-2:])
            pixels = torch.cat([pixels, drawn], dim=3)
        said, t = "noise", 0.0
        if moment is not None:
            t = moment.t.mean().item()
            said = f"step {int(moment.taken.max())}   t {t:.2f}   H {moment.entropy.mean().item():.2f}"
        frames.append(_captioned(step_grid(pixels, columns), said, t))
    return frames


def _captioned(picture: Image.Image, text: str, share: float) -> Image.Image:
    """With a line of text and a bar of so much of its width below."""
    strip = Image.new("RGB", (picture.width, picture.height + FILM_CAPTION), (24, 24, 24))
    strip.paste(picture, (0, 0))
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(12)
    draw.text((6, picture.height + 3), text, fill=INK, font=font)
    draw.rectangle((0, strip.height - 4, picture.width, strip.height), fill=(64, 64, 64))
    if share > 0:
        draw.rectangle((0, strip.height - 4, share * picture.width, strip.height), fill=BAR)
    return strip


def state_pixels(states: Tensor, size: Sequence[int]) -> Tensor:
    """States uint8 [B, D, T, h, w] -> uint8 pixels [B, 3, height, width] of the first frame; `size`: height, width.

    A position is a square of its D tokens, row by row.
    """
    count, channels, _, height, width = states.shape
    side = math.ceil(math.sqrt(channels))
    colours = torch.tensor([*STATE_COLOURS, GROUND], dtype=torch.uint8)
    cells = torch.full((count, side * side, height, width), len(STATES))
    cells[:, :channels] = states[:, :, 0]
    cells = torch.nn.functional.pixel_shuffle(cells, side)
    rows, columns = (torch.arange(n) * m // n for n, m in zip(size, cells.shape[-2:]))
    return colours[cells[:, 0][:, rows][:, :, columns]].permute(0, 3, 1, 2)
