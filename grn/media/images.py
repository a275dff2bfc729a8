"""Pictures out of bytes that nobody vouches for, to tensors: pure functions."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from grn.media import jpeg
from grn.media.colour import ProfileError, to_srgb
from grn.media.skips import Note, Reason, Skip, note

SUFFIXES_OF_FORMATS = Image.registered_extensions()  # which loads all of Pillow's plugins


# What pictures are kept in, of what this Pillow reads; its other plugins are seldom tried on hostile bytes, or run a
# program (EPS).
IMAGE_FORMATS = tuple(
    format
    for format in ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI")
    if format in Image.OPEN
)


_OTHERS = (suffix[1:] for suffix, format in SUFFIXES_OF_FORMATS.items() if format in IMAGE_FORMATS)


IMAGE_SUFFIXES = tuple(dict.fromkeys(("png", "jpg", "jpeg", "webp", *_OTHERS)))  # of several, a sample's first is taken


VIDEO_SUFFIXES = (
    "mp4", "webm", "mkv", "mov", "m4v", "3gp", "3g2", "avi", "ts", "mts", "m2ts", "mpg", "mpeg", "vob", "flv", "wmv",
    "asf", "ogv",
)  # fmt: skip


MAX_PIXELS = 64 * 2**20


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`open_image`, in RGB: transparent parts show white."""
    return to_rgb(open_image(data, max_pixels=max_pixels))


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A file of one of `IMAGE_FORMATS` -> RGB, or RGBA where it has transparency; upright, in sRGB.

    Turned as EXIF says; 16-bit gray is scaled to 8 bits; colors are as the ICC profile says; of an animation the first
    frame. A JPEG may lack its end marker.

    Raises:
        Skip: not such an image, or broken, or more than `max_pixels` by its header.
    """
    try:
        image = _open(data, max_pixels)
        is_jpeg = image.format in ("JPEG", "MPO")
        if is_jpeg and not jpeg.has_end(data):
            note(Note.NO_END_MARKER)
        try:
            image.load()
        except OSError:
            whole = jpeg.completed(data) if is_jpeg else None
            if whole is None:
                raise
            image = _open(whole, max_pixels)
            image.load()
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):  # of PNG and PPM it is 16 bits
            raise Skip(Reason.UNKNOWN_RANGE)
        return to_8_bits(ImageOps.exif_transpose(image))
    except (Skip, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise Skip(Reason.TOO_MANY_PIXELS) from None
    except Exception:  # what Pillow's plugins raise on broken files has no common base
        raise Skip(Reason.UNDECODABLE_IMAGE) from None


def _open(data: bytes, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    if image.width * image.height > max_pixels:
        raise Skip(Reason.TOO_MANY_PIXELS)
    return image


def to_8_bits(image: Image.Image) -> Image.Image:
    """Any mode of `IMAGE_FORMATS` -> RGB, or RGBA where it has transparency, of 8 bits a channel, in sRGB."""
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode.startswith("I"):  # 16-bit gray, which convert() would clip at 255
        grey = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(np.round(grey / 257.0), 0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        image = image.convert("L") if image.mode in ("L", "LA") else image.convert("RGBA").convert("RGB")
        image.info.pop("transparency", None)
    elif image.mode not in ("L", "CMYK", "RGB"):
        image = image.convert("RGB")
    if profile:
        try:
            image = to_srgb(image, profile)
        except ProfileError:
            note(Note.BAD_PROFILE)
            image = image.copy()
        image.info.pop("icc_profile", None)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
    return image


def to_rgb(image: Image.Image, *, background: str = "white") -> Image.Image:
    """`to_8_bits`, in RGB: where it is transparent, the background shows."""
    image = to_8_bits(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image


def center_crop(image: Image.Image, size: int, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The center square as in ADM's preprocessing; see `resize_and_crop`."""
    return resize_and_crop(image, size, size, max_pixels=max_pixels)


def resize_and_crop(image: Image.Image, height: int, width: int, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Halved by boxes while that is possible, resized bicubically until it just covers height x width, its center cut.

    Args:
        image: any size; one of this size is returned as it is.
        height, width: of what comes out, in pixels.

    Raises:
        Skip: so narrow that its resized form would exceed `max_pixels`.
    """
    if image.size == (width, height):
        return image
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return cover_and_crop(image, height, width, max_pixels=max_pixels, resampling=Image.Resampling.BICUBIC)


def cover_and_crop(
    image: Image.Image,
    height: int,
    width: int,
    *,
    max_pixels: int = MAX_PIXELS,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """Resized in one go until it just covers height x width, its center cut; arguments as of `resize_and_crop`.

    By Lanczos, it is how the authors bring the first frame of image to video to the size of the clip.
    """
    scale = max(height / image.height, width / image.width)
    covering = round(image.width * scale), round(image.height * scale)
    if covering[0] * covering[1] > max_pixels:
        raise Skip(Reason.TOO_MANY_PIXELS)
    image = image.resize(covering, resampling)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 [3, 1, H, W] (an image is a clip of one frame)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(1).contiguous()
