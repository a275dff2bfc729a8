"""Pictures of samples: PNG grids and GIF films of the map being refined."""

import math
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from grn.files import write_atomically
from grn.sampler import Step


def grid(images: Tensor, columns: int | None = None, scale: int = 1) -> Image.Image:
    """uint8 [N, 3, H, W] -> one picture, row by row, as square as may be; `scale` enlarges each pixel."""
    picture = make_grid(images.cpu(), nrow=columns or math.ceil(math.sqrt(len(images))), padding=2, pad_value=96)
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


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
    """A sampler callback that keeps the predicted map of every step, on the CPU.

    `frames(decode)` gives one picture a step: the decoded prediction of every sample, samples that are done standing
    still.
    """

    def __init__(self) -> None:
        self._predictions: list[Tensor] = []

    def __call__(self, step: Step) -> None:
        current = step.predicted.cpu()
        if self._predictions:
            whole = self._predictions[-1].clone()
            whole[step.rows] = current
            current = whole
        self._predictions.append(current)

    def frames(self, decode: Callable[[Tensor], Tensor], *, columns: int | None = None) -> list[Image.Image]:
        """`decode`: int64 tokens [B, D, T, h, w] (CPU) -> uint8 pixels [B, 3, T', H, W]; its first frame is shown."""
        pixels = [decode(tokens)[:, :, 0] for tokens in self._predictions]
        return [grid(images, columns, scale_for(images.shape[-1])) for images in pixels]
