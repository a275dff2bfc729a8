"""A picture that samples start from, and a mask of what is drawn anew: image to image and inpainting, by `Start`."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from grn.data.folders import read_file
from grn.data.samples import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    Reason,
    Skip,
    decode_image,
    resize_and_crop,
    to_rgb,
    to_tensor,
)
from grn.errors import UserError
from grn.sampler import Start
from grn.training import RefinerModule

STRENGTH = 0.6  # where nothing is masked: the picture is still to be seen, and yet another one


def start_from_image(
    module: RefinerModule,
    init: str | Path | Image.Image | None,
    *,
    strength: float | None = None,
    mask: str | Path | Image.Image | None = None,
) -> Start | None:
    """One map, B = 1, on the module's device; None without `init`.

    Args:
        init: a PNG, JPEG or WebP, or a picture of Pillow's, of any size: brought to the size of the samples as training
            data are (DESIGN 1.4).
        strength: of `Start`; None takes 1 with a mask, else 0.6.
        mask: a picture of the size of `init`: white (at least half) is drawn anew, black is kept. Of a token, all is
            drawn anew where any of its pixels is.

    Raises:
        UserError: a file that cannot be used, another size of mask, a mask or strength without `init`, or a strength
            outside (0, 1].
    """
    if init is None:
        for key, value in (("mask", mask), ("strength", strength)):
            if value is not None:
                raise UserError(f"{key}={value} is of an image to start from: give init=image.png, too")
        return None
    if strength is not None and not isinstance(strength, (int, float)):
        raise UserError(f"strength={strength} must be a number above 0 and at most 1")
    image = read_image("init", init)
    positions, stride = module.token_shape[2:], module.tokenizer.stride
    try:
        cropped = resize_and_crop(image, *(side * stride for side in positions))
    except Skip as skip:
        raise UserError(f"init={init}: {skip}") from None
    tokens = torch.stack(list(module.tokenize({"pixels": to_tensor(cropped)[None].to(module.device)})))
    if mask is None:
        return Start(tokens, STRENGTH if strength is None else strength)
    masked = read_image("mask", mask)
    if masked.size != image.size:
        raise UserError(
            f"mask={mask} is {masked.width}x{masked.height}, but init={init} is {image.width}x{image.height}: "
            "make both of one size"
        )
    redraw = positions_to_redraw(masked, positions).to(module.device)
    return Start(tokens, 1.0 if strength is None else strength, redraw)


def positions_to_redraw(mask: Image.Image, positions: tuple[int, int]) -> Tensor:
    """The positions of a map of (rows, columns) whose pixels, in the centre of its shape, are white anywhere.

    Returns:
        bool [1, 1, 1, rows, columns].
    """
    rows, columns = positions
    side = min(mask.height / rows, mask.width / columns)
    width, height = max(1, round(columns * side)), max(1, round(rows * side))
    left, top = (mask.width - width) // 2, (mask.height - height) // 2
    white = np.asarray(mask.convert("L").crop((left, top, left + width, top + height))) >= 128
    # Its windows cover every pixel, also of sides that are no multiple of the map's.
    return F.adaptive_max_pool2d(torch.from_numpy(white).float()[None, None], positions)[:, :, None] > 0


def read_image(key: str, given: str | Path | Image.Image) -> Image.Image:
    """An upright RGB picture out of a file that nobody vouches for, or of Pillow's.

    Raises:
        UserError: it is neither, or cannot be used; `key` says whose mistake it is.
    """
    if isinstance(given, Image.Image):
        if given.width * given.height > MAX_PIXELS:
            raise UserError(f"{key}: {Reason.TOO_MANY_PIXELS.value}")
        try:
            return to_rgb(ImageOps.exif_transpose(given))
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
        return decode_image(read_file(path))
    except Skip as skip:
        raise UserError(f"{key}={path}: {skip}") from None
