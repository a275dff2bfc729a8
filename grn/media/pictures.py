"""Pictures of samples: PNG grids, GIF films of the refinement, token states."""

import functools
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from grn.media.mp4 import save_mp4
from grn.runtime.files import write_atomically

STATE_COLOURS = ((0, 158, 115), (0, 114, 178), (213, 94, 0), (48, 48, 48))  # told apart by the color-blind, too
GROUND, INK, BAR = (96, 96, 96), (235, 235, 235), (86, 180, 233)
RING = (240, 228, 66)
CAPTION = 14  # pixels of a line of it
LINES = 4  # of a caption, at most
FONTS = ((11, CAPTION), (9, 11))  # (size, pixels of a line): the smaller one where captions take more lines
MAX_FILM_BYTES = 1_000_000  # what mails and chats take without a question
FEW_COLOURS = 2048  # of a frame whose 256 are chosen by median cut: grays and flat colors stay exact
SORTED = 200  # samples in a sorted grid
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
STEP_SIZE = (1600, 6400)  # width and height at most of what films and pages show of each step


def grid(
    images: Tensor, columns: int | None = None, scale: int = 1, captions: Sequence[str] | None = None
) -> Image.Image:
    """uint8 [N, 3, H, W] -> one picture, row by row, as square as may be; `scale` enlarges each pixel.

    Args:
        captions: N texts, one below each image, in as many lines as it takes at its width, `LINES` at most.
    """
    if captions is None:
        return single(_tiled(images, columns, scale))
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    height, width = (2 + length * scale for length in images.shape[-2:])
    rows = math.ceil(len(images) / columns)
    texts, font, line = _set(captions, width - 4)
    below = line * max(map(len, texts))
    picture = Image.new("RGB", (columns * width + 2, rows * (height + below) + 2), GROUND)
    draw = ImageDraw.Draw(picture)
    for place, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = 2 + place % columns * width, 2 + place // columns * (height + below)
        tile = single(image).resize((width - 2, height - 2), Image.Resampling.NEAREST)
        picture.paste(tile, (left, top))
        for number, words in enumerate(text):
            place = left + width // 2 - 1, top + height - 2 + number * line
            draw.text(place, words, fill=INK, font=font, anchor="ma")
    return picture


def _set(captions: Sequence[str], width: int) -> tuple[list[list[str]], Font, int]:
    """(The lines of each in so many pixels, at least one and at most `LINES`; their font; pixels of a line)."""
    for size, line in FONTS:
        font = ImageFont.load_default(size)
        texts = [_lines(caption, width, font) for caption in captions]
        if max(map(len, texts)) <= LINES:
            return texts, font, line
    return [[*text[: LINES - 1], _cut(" ".join(text[LINES - 1 :]), width, font)] for text in texts], font, line


def _lines(text: str, width: int, font: Font) -> list[str]:
    """The text, broken between words, and in those that are longer than a line."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _cut(text: str, width: int, font: Font) -> str:
    """The text, or its beginning and an ellipsis, in so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def save_clips(frames: Iterable[Tensor], path: Path, *, fps: float, columns: int | None = None) -> Path:
    """Writes clips side by side as one mp4, atomically: frames uint8 [N, 3, H, W] each, H and W even, as they come."""
    return save_mp4((_tiled(frame, columns, scale_for(frame.shape[-1])) for frame in frames), path, fps=fps)


def _tiled(images: Tensor, columns: int | None, scale: int) -> Tensor:
    """uint8 [N, 3, H, W] -> [3, H', W'], a line of two pixels around each of several, not of one."""
    count, tiled = len(images), images[0].cpu()
    if count > 1:
        columns = min(columns or math.ceil(math.sqrt(count)), count)
        framed = F.pad(images.cpu(), (2, 0, 2, 0, 0, 0, 0, -count % columns), value=GROUND[0])
        tiled = F.pad(rearrange(framed, "(r c) k h w -> k (r h) (c w)", c=columns), (0, 2, 0, 2), value=GROUND[0])
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


def save_film(frames: list[Image.Image], path: Path, *, seconds: float = 4.0, max_bytes: int = MAX_FILM_BYTES) -> Path:
    """Writes a looping GIF of about `seconds`, the last frame held for another second and a half, atomically.

    What would be more than `max_bytes` has every second frame left out until it is not, or until less than sixteen are
    left; then it is made smaller.
    """
    indexed = [_indexed(frame) for frame in frames]
    data = _film_bytes(indexed, seconds)
    while len(data) > max_bytes and frames[0].width > 64:
        if len(frames) >= 16:
            frames, indexed = ([x[0], *x[1:-1][1::2], x[-1]] for x in (frames, indexed))
        else:
            frames = [frame.resize((frame.width * 2 // 3, frame.height * 2 // 3)) for frame in frames]
            indexed = [_indexed(frame) for frame in frames]
        data = _film_bytes(indexed, seconds)
    return write_atomically(path, lambda temporary: temporary.write_bytes(data))


def _indexed(frame: Image.Image) -> Image.Image:
    # Dithered, the enlarged pixels would not be flat any more, and the film several times as large.
    few = functools.partial(frame.quantize, 256, dither=Image.Dither.NONE)
    if frame.getcolors(FEW_COLOURS) is not None:
        return few()
    # Pillow's median cut takes thirty times as long as its octree; nearest colors undo what that is coarser.
    return frame.quantize(palette=few(method=Image.Quantize.FASTOCTREE), dither=Image.Dither.NONE)


def _film_bytes(indexed: list[Image.Image], seconds: float) -> bytes:
    first, *others = indexed
    each = max(20, round(1000 * seconds / len(indexed)))
    durations = [each] * len(others) + [1500]
    buffer = io.BytesIO()
    first.save(buffer, format="GIF", save_all=True, append_images=others, duration=durations, loop=0, disposal=2)
    return buffer.getvalue()


def step_grid(pixels: Tensor, columns: int | None = None) -> Image.Image:
    """A `grid` of uint8 [N, 3, H, W] that a film or page of dozens can have, made smaller than `STEP_SIZE`."""
    picture = grid(pixels, columns, scale_for(pixels.shape[-2]))
    picture.thumbnail(STEP_SIZE)
    return picture


def sorted_grid(images: Tensor, difficulty: Tensor, steps: Tensor, columns: int | None = None) -> Image.Image:
    """uint8 [N, 3, H, W] from the easiest to the most difficult, with difficulty [N] and steps int64 [N] below each.

    Of more than `SORTED`, so many are shown, evenly spread over the order.
    """
    order = difficulty.argsort()
    order = order[torch.linspace(0, len(order) - 1, min(len(order), SORTED)).round().long()]
    captions = [f"H {difficulty[number]:.2f} · {steps[number]} steps" for number in order.tolist()]
    return grid(images[order], columns, scale_for(images.shape[-1]), captions)


def steps_chart(histogram: list[int], by_class: list[float]) -> Image.Image:
    """Two rows of bars: how many samples took 0, 1, 2, ... steps, and the mean number of steps of each class."""
    first = next(number for number, count in enumerate(histogram) if count)
    last = max(number for number, count in enumerate(histogram) if count)
    picture = Image.new("RGB", (640, 400), (24, 24, 24))
    _bars(picture, 0, "samples by steps", histogram[first : last + 1], first)
    _bars(picture, 200, "mean steps by class", by_class, 0)
    return picture


def curve_chart(
    title: str, curves: Mapping[str, Sequence[tuple[float, float]]], best: tuple[float, float] | None = None
) -> Image.Image:
    """Points (x, y) joined by lines, in axes from the least to the most: of one curve each y, of several their names.

    Args:
        curves: name -> its points in any order; points that are not finite are left out.
        best: a point of them that a ring marks, with its value.
    """
    curves = {name: sorted(p for p in points if all(map(math.isfinite, p))) for name, points in curves.items()}
    names = list(curves) if len(curves) > 1 else []
    picture = Image.new("RGB", (640, 320 + 16 * len(names)), (24, 24, 24))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    left, right, top, base = 56, picture.width - 32, 56, 280
    draw.text((16, 12), title, fill=INK, font=font)
    every = [point for points in curves.values() for point in points]
    if not every:
        return picture
    (x0, x1), (y0, y1) = ((min(values), max(values)) for values in zip(*every))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * (x - x0) / (x1 - x0 or 1), base - (base - top) * (y - y0) / (y1 - y0 or 1)

    draw.line((left - 8, base + 8, right + 8, base + 8), fill=GROUND)
    for x in sorted({x for x, _ in every} if len({x for x, _ in every}) <= 6 else {x0, x1}):
        draw.text((at(x, y0)[0], base + 12), f"{x:.6g}", fill=INK, font=font, anchor="ma")
    for y in {y0, y1}:
        draw.text((left - 12, at(x0, y)[1]), f"{y:.4g}", fill=INK, font=font, anchor="rm")
    for number, (name, points) in enumerate(curves.items()):
        colour = (BAR, *STATE_COLOURS[:3])[number % 4]
        draw.line([at(*point) for point in points], fill=colour, width=2)
        for x, y in points:
            across, down = at(x, y)
            draw.ellipse((across - 3, down - 3, across + 3, down + 3), fill=colour)
            if not names:
                draw.text((across, down - 6), f"{y:.4g}", fill=INK, font=font, anchor="mb")
        if names:
            draw.text((16, 312 + 16 * number), name, fill=colour, font=font)
    if best is not None and best in every:
        across, down = at(*best)
        draw.ellipse((across - 7, down - 7, across + 7, down + 7), outline=RING, width=2)
        if names:
            draw.text((across, down - 10), f"{best[1]:.4g}", fill=RING, font=font, anchor="mb")
    return picture


def _bars(picture: Image.Image, top: int, title: str, values: Sequence[float], first: int) -> None:
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
