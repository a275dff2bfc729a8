"""Conversion to sRGB: images with an ICC profile, and HDR video."""

import io
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

MAX_PROFILE_BYTES = 4 * 2**20  # those of printing presses have two
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # color space of a profile -> Pillow's mode of such pictures
UNSEEN = 2  # of 255: profiles that change no color by more are those of sRGB itself

WHITE_NITS = 203.0  # what HDR video shows diffuse white at, ITU-R BT.2408
HLG_PEAK_NITS, HLG_GAMMA = 1000.0, 1.2  # of the display that HLG is defined on, ITU-R BT.2100
DISPLAY_GAMMA = 2.4  # of the displays that video is made for, ITU-R BT.1886
TO_XYZ = {  # FFmpeg's numbers of primaries -> matrix from linear RGB, their white is D65
    1: [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]],
    9: [[0.6370, 0.1446, 0.1689], [0.2627, 0.6780, 0.0593], [0.0000, 0.0281, 1.0610]],
    12: [[0.4866, 0.2657, 0.1982], [0.2290, 0.6917, 0.0793], [0.0000, 0.0451, 1.0439]],
}
BT709, BT2020 = 1, 9
PQ, HLG = 16, 18  # FFmpeg's numbers of transfer functions


class ProfileError(Exception):
    """A color profile that cannot be used with its picture."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """A picture whose colors an ICC profile tells -> RGB as sRGB has it.

    Args:
        image: of mode L, RGB or CMYK.

    Raises:
        ProfileError: too large, damaged, or of another kind of picture.
    """
    if len(profile) > MAX_PROFILE_BYTES:
        raise ProfileError
    try:
        mode, transform = _transform(profile)
        if image.mode != mode and (image.mode, mode) != ("L", "RGB"):
            raise ProfileError
        image = image.convert(mode)
        shown = None if transform is None else ImageCms.applyTransform(image, transform)
        return image if shown is None else shown
    except (ImageCms.PyCMSError, OSError, ValueError, KeyError, TypeError):
        raise ProfileError from None


@lru_cache(maxsize=8)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """(Mode of pictures that the profile is of, the transform); None for sRGB's own, which has many names."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space: str = source.profile.xcolor_space  # pyright: ignore[reportAttributeAccessIssue] a profile, not a file
    mode = MODES[space.strip()]
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "RGB":
        cube = np.stack(np.meshgrid(*[np.linspace(0, 255, 9)] * 3), axis=-1).round().astype(np.uint8).reshape(27, 27, 3)
        seen = np.asarray(ImageCms.applyTransform(Image.fromarray(cube), transform))
        if np.abs(seen.astype(int) - cube).max() <= UNSEEN:
            return mode, None
    return mode, transform


def from_hdr(pixels: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Frames of HDR video -> as video of standard range has them; what is brighter than white becomes white.

    (The scaler of FFmpeg 8 gives the same, but needs seconds for its tables, for every size of frame.)

    Args:
        pixels: uint16 [H, W, 3], R'G'B' in full range.
        transfer: `PQ` or `HLG`.
        primaries: as FFmpeg numbers them; BT.2020's where they are unknown.

    Returns:
        uint8 [H, W, 3].
    """
    light = torch.from_numpy(_light(transfer)[pixels])
    if transfer == HLG:  # of the scene so far: displays make bright parts brighter
        weights = torch.tensor([0.2627, 0.6780, 0.0593])
        light = light * (light @ weights)[..., None].pow(HLG_GAMMA - 1) * (HLG_PEAK_NITS / WHITE_NITS)
    light = (light @ _to_bt709(primaries)).clamp_(0, 1)
    return light.pow_(1 / DISPLAY_GAMMA).mul_(255).round_().to(torch.uint8).numpy()


@lru_cache
def _light(transfer: int) -> np.ndarray:
    """float32 [65536]: linear light of each value; of `PQ` as shown, white being 1, of `HLG` as filmed."""
    value = np.arange(2**16) / (2**16 - 1)
    if transfer == PQ:  # SMPTE ST 2084
        root = value ** (32 / 2523)
        ratio = np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)
        light = ratio ** (16384 / 2610) * (10_000 / WHITE_NITS)
    else:  # ARIB STD-B67
        light = np.where(value <= 0.5, value**2 / 3, (np.exp((value - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    return light.astype(np.float32)


@lru_cache
def _to_bt709(primaries: int) -> Tensor:
    """float32 [3, 3], to be multiplied from the right."""
    source, target = np.array(TO_XYZ.get(primaries, TO_XYZ[BT2020])), np.array(TO_XYZ[BT709])
    return torch.from_numpy((np.linalg.inv(target) @ source).T.astype(np.float32))
