"""Image to image and inpainting: an image and a mask as a `Start`."""

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from grn.data.prepare.folders import read_file
from grn.media.images import IMAGE_SUFFIXES, MAX_PIXELS, open_image, resize_and_crop, to_8_bits, to_rgb, to_tensor
from grn.media.skips import Reason, Skip
from grn.runtime.errors import UserError
from grn.sampling.bundle import RefinerBundle
from grn.sampling.refinement import Start

log = logging.getLogger(__name__)

STRENGTH = 0.6  # where nothing is masked: the picture is still to be seen, and yet another one


def start_from_image(
    bundle: RefinerBundle,
    init: str | Path | Image.Image | None,
    *,
    shape: tuple[int, int, int, int],
    strength: float | None = None,
    mask: str | Path | Image.Image | None = None,
    names: tuple[str, str] = ("init", "mask"),
) -> Start | None:
    """One map, B = 1, on the bundle's device; None without `init`.

    Args:
        init: a file of one of `IMAGE_FORMATS`, or a picture of Pillow's, of any size: brought to the size of the
            samples as training data are.
        shape: (D, T, h, w) of the samples, in tokens.
        names: what the user calls `init` and `mask`.
        strength: of `Start`; None takes 1 with a mask, else 0.6.
        mask: a picture of the size of `init`: white (at least half) is redrawn, black is kept, and so is what is
            transparent. Of a token, all is redrawn where any of its pixels is.

    Raises:
        UserError: a file that cannot be used, another size of mask, a mask or strength without `init`, or a strength
            outside (0, 1].
    """
    if init is None:
        for key, value in ((names[1], mask), ("strength", strength)):
            if value is not None:
                raise UserError(f"{key}={value} is of an image to start from: give {names[0]}=image.png, too")
        return None
    if strength is not None and not isinstance(strength, (int, float)):
        raise UserError(f"strength={strength} must be a number above 0 and at most 1")
    image = to_rgb(read_image(names[0], init))
    positions, stride = shape[2:], bundle.tokenizer.stride
    try:
        cropped = resize_and_crop(image, *(side * stride for side in positions))
    except Skip as skip:
        raise UserError(f"{names[0]}={init}: {skip}") from None
    tokens = bundle.tokenize(to_tensor(cropped)[None].to(bundle.device))
    if mask is None:
        return Start(tokens, STRENGTH if strength is None else strength)
    masked = read_image(names[1], mask)
    if masked.size != image.size:
        raise UserError(
            f"{names[1]}={mask} is {masked.width}x{masked.height}, but {names[0]}={init} is "
            f"{image.width}x{image.height}: give both the same size"
        )
    redraw = positions_to_redraw(masked, positions).to(bundle.device)
    if redraw.all():
        log.warning("%s=%s is white everywhere: the whole picture is redrawn", names[1], mask)
    elif not redraw.any():
        log.warning("%s=%s is white nowhere (transparent parts count as black): nothing is redrawn", names[1], mask)
    return Start(tokens, 1.0 if strength is None else strength, redraw)


def positions_to_redraw(mask: Image.Image, positions: tuple[int, int]) -> Tensor:
    """The positions of a map of (rows, columns) whose pixels, in the center of its shape, are white anywhere.

    Transparent pixels count as black: a mask may be a layer on which something white was painted.

    Returns:
        bool [1, 1, 1, rows, columns].
    """
    rows, columns = positions
    side = min(mask.height / rows, mask.width / columns)
    width, height = max(1, round(columns * side)), max(1, round(rows * side))
    left, top = (mask.width - width) // 2, (mask.height - height) // 2
    grey = to_rgb(mask, background="black").convert("L").crop((left, top, left + width, top + height))
    white = np.asarray(grey) >= 128
    # Its windows cover every pixel, also of sides that are not a multiple of the map's.
    return F.adaptive_max_pool2d(torch.from_numpy(white).float()[None, None], positions)[:, :, None] > 0


def read_image(key: str, given: str | Path | Image.Image) -> Image.Image:
    """An upright picture, RGB or RGBA, out of a file that nobody vouches for, or of Pillow's.

    Raises:
        UserError: it is neither, or cannot be used; `key` says whose mistake it is.
    """
    if isinstance(given, Image.Image):
        if given.width * given.height > MAX_PIXELS:
            raise UserError(f"{key}: {Reason.TOO_MANY_PIXELS.value}")
        try:
            return to_8_bits(ImageOps.exif_transpose(given))
        except OSError:  # it was opened, and is read only here
            raise UserError(f"{key}: {Reason.UNDECODABLE_IMAGE.value}") from None
    if not isinstance(given, (str, Path)):
        raise UserError(f"{key}: the path of an image, or a picture of Pillow's, is needed, not {type(given).__name__}")
    path = Path(given).expanduser()
    if not path.is_file():
        raise UserError(f"{key}={path}: there is no such file")
    if path.suffix.lower().removeprefix(".") not in IMAGE_SUFFIXES:
        raise UserError(f"{key}={path}: give one of {', '.join(IMAGE_SUFFIXES)}")
    try:
        return open_image(read_file(path))
    except Skip as skip:
        raise UserError(f"{key}={path}: {skip}") from None
