"""Pictures of samples: PNG grids, GIF films of the map being refined, and what becomes of each token meanwhile."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from grn.files import write_atomically
from grn.mp4 import save_mp4
from grn.sampler import Step

# What a step makes of a token: a prediction that was not there before, the prediction of before, noise where there was
# a prediction, noise where there was noise.
STATES = ("filled", "kept", "erased", "blank")
STATE_COLOURS = ((0, 158, 115), (0, 114, 178), (213, 94, 0), (48, 48, 48))  # told apart by the colour-blind, too
GROUND, INK, BAR = (96, 96, 96), (235, 235, 235), (86, 180, 233)
CAPTION = 14  # pixels
SORTED = 200  # samples in a sorted grid


def grid(images: Tensor, columns: int | None = None, scale: int = 1) -> Image.Image:
    """uint8 [N, 3, H, W] -> one picture, row by row, as square as may be; `scale` enlarges each pixel."""
    return single(_tiled(images, columns, scale))


def save_clips(frames: Iterable[Tensor], path: Path, *, fps: float, columns: int | None = None) -> Path:
    """Writes clips side by side as one mp4, atomically: frames uint8 [N, 3, H, W] each, H and W even, as they come."""
    return save_mp4((_tiled(frame, columns, scale_for(frame.shape[-1])) for frame in frames), path, fps=fps)


def _tiled(images: Tensor, columns: int | None, scale: int) -> Tensor:
    tiled = make_grid(images.cpu(), nrow=columns or math.ceil(math.sqrt(len(images))), padding=2, pad_value=GROUND[0])
    return tiled.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)


def scale_for(size: int) -> int:
    """A whole factor that makes small images (32 pixels) large enough to look at."""
    return max(1, 96 // size)


def single(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] -> the same, pixel by pixel, as a picture."""
    return Image.fromarray(image.cpu().permute(1, 2, 0).numpy())


def save(image: Image.Image, path: Path) -> Path:
    """Writes a PNG atomically."""
    return write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))


def save_film(frames: list[Image.Image], path: Path, *, seconds: float = 4.0) -> Path:
    """Writes a looping GIF of about `seconds`, the last frame held for another second and a half, atomically."""
    each = max(20, round(1000 * seconds / len(frames)))
    durations = [each] * (len(frames) - 1) + [1500]
    # Dithered, the enlarged pixels would not be flat any more, and the film several times as large.
    first, *others = [frame.quantize(256, dither=Image.Dither.NONE) for frame in frames]

    def write(temporary: Path) -> None:
        first.save(temporary, format="GIF", save_all=True, append_images=others, duration=durations, loop=0, disposal=2)

    return write_atomically(path, write)


class FilmRecorder:
    """A sampler callback that keeps the predicted tokens of every step, on the CPU: those of the latents it shows.

    `frames(decode)` gives one picture a step: the decoded prediction of every sample, samples that are done standing
    still. Of clips, the first latents that are drawn are shown; those behind them have no part in their pixels.

    Args:
        states: keep the `STATES` of the tokens, too, to be shown beside the predictions. Given tokens (`Start`) that no
            prediction has replaced count as noise.
        given: of clips, how many first latents stay as they were given.
    """

    def __init__(self, *, states: bool = False, given: int = 0) -> None:
        self._shown, self._given = slice(given, given + 1), torch.empty(0)  # uint8 [B, D, given, h, w]
        self._predictions: list[Tensor] = []  # uint8 [B, D, 1, h, w] each; HBQ has 256 classes at most
        self._states: list[Tensor] | None = [] if states else None
        self._kept: Tensor | None = None  # bool [B, D, 1, h, w]: where the map of each sample is predicted

    def __call__(self, step: Step) -> None:
        tokens, predicted, kept = (x[:, :, self._shown] for x in (step.tokens, step.predicted, step.kept))
        if self._states is not None:
            kept = kept.cpu()
            before = torch.zeros_like(kept) if self._kept is None else self._kept[step.rows]
            states = token_states(before, kept, (predicted == tokens).cpu())
            self._kept = kept if self._kept is None else self._kept.index_copy(0, step.rows, kept)
            self._states.append(_whole(self._states, step.rows, states))
        if not self._predictions:
            self._given = step.tokens[:, :, : self._shown.start].to(torch.uint8).cpu()
        self._predictions.append(_whole(self._predictions, step.rows, predicted.to(torch.uint8).cpu()))

    def frames(self, decode: Callable[[Tensor], Iterable[Tensor]], *, columns: int | None = None) -> list[Image.Image]:
        """`decode`: int64 tokens [B, D, T, h, w] (CPU) -> frames, uint8 [B, 3, H, W] each, of which the last is
        shown."""
        pixels = []
        for predicted in self._predictions:
            (last,) = deque(decode(torch.cat([self._given, predicted], dim=2).long()), maxlen=1)
            pixels.append(last.cpu())
        if self._states is not None:
            pixels = [torch.cat([x, state_pixels(y, x.shape[-2:])], dim=3) for x, y in zip(pixels, self._states)]
        return [grid(images, columns, scale_for(images.shape[-2])) for images in pixels]


def token_states(before: Tensor, now: Tensor, same: Tensor) -> Tensor:
    """The state of every token after a step, uint8 as in `STATES`, by three bools of its shape.

    Args:
        before, now: whether the map held a prediction, and whether it does now.
        same: whether what is predicted now is what the map held.
    """
    filled, kept, erased, blank = range(len(STATES))
    taken = torch.where(before & same, kept, filled)
    return torch.where(now, taken, torch.where(before, erased, blank)).to(torch.uint8)


def state_pixels(states: Tensor, size: tuple[int, int]) -> Tensor:
    """States uint8 [B, D, T, h, w] -> uint8 pixels [B, 3, *size] of the first frame.

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


def sorted_grid(images: Tensor, difficulty: Tensor, steps: Tensor, columns: int | None = None) -> Image.Image:
    """uint8 [N, 3, H, W] from the easiest to the most difficult, with difficulty [N] and steps int64 [N] below each.

    Of more than `SORTED`, so many are shown, evenly spread over the order.
    """
    order = difficulty.argsort()
    order = order[torch.linspace(0, len(order) - 1, min(len(order), SORTED)).round().long()]
    columns, scale = columns or math.ceil(math.sqrt(len(order))), scale_for(images.shape[-1])
    columns = min(columns, len(order))
    height, width = (2 + length * scale for length in images.shape[-2:])
    picture = Image.new("RGB", (columns * width + 2, math.ceil(len(order) / columns) * (height + CAPTION) + 2), GROUND)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for place, number in enumerate(order.tolist()):
        left, top = 2 + place % columns * width, 2 + place // columns * (height + CAPTION)
        tile = single(images[number]).resize((width - 2, height - 2), Image.Resampling.NEAREST)
        picture.paste(tile, (left, top))
        caption = f"{difficulty[number]:.3f}, {steps[number]}"
        draw.text((left + width // 2, top + height - 2), caption, fill=INK, font=font, anchor="ma")
    return picture


def steps_chart(histogram: list[int], by_class: list[float]) -> Image.Image:
    """Two rows of bars: how many samples took 0, 1, 2, ... steps, and the mean number of steps of each class."""
    first = next(number for number, count in enumerate(histogram) if count)
    last = max(number for number, count in enumerate(histogram) if count)
    picture = Image.new("RGB", (640, 400), (24, 24, 24))
    _bars(picture, 0, "samples by steps", histogram[first : last + 1], first)
    _bars(picture, 200, "mean steps by class", by_class, 0)
    return picture


def _bars(picture: Image.Image, top: int, title: str, values: list[float], first: int) -> None:
    """Bars for `values` in 200 rows of pixels, from zero on; `first` stands below the first one."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    left, right, base, height = 16, picture.width - 16, top + 180, 140
    most = max(values)
    draw.text((left, top + 8), f"{title} (highest: {most:.4g})", fill=INK, font=font)
    width = (right - left) / len(values)
    for place, value in enumerate(values):
        if value > 0:
            x, gap = left + place * width, min(2, width / 4)
            draw.rectangle((x, base - height * value / most, x + width - gap, base), fill=BAR)
    for place in sorted({0, len(values) // 2, len(values) - 1}):
        draw.text((left + (place + 0.5) * width, base + 3), str(first + place), fill=INK, font=font, anchor="ma")


def _whole(earlier: list[Tensor], rows: Tensor, current: Tensor) -> Tensor:
    """What is known of all samples: `current` of those in `rows`, of the others what was known last."""
    return earlier[-1].index_copy(0, rows, current) if earlier else current
