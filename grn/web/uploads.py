"""Files that are dropped on the page: pictures of bounded size, decoded by what decodes training data."""

from PIL import Image

from grn.media.images import open_image
from grn.media.skips import Skip
from grn.runtime.errors import UserError

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 16 * 2**20


def picture(name: str, data: bytes) -> Image.Image:
    """RGB or RGBA, upright.

    Raises:
        UserError: not an image, broken, or too large.
    """
    shown = name if len(name) <= 60 else f"{name[:57]}..."
    if len(data) > MAX_BYTES:
        raise UserError(f"{shown} has {len(data) / 2**20:.0f} MiB; at most {MAX_BYTES // 2**20}")
    try:
        return open_image(data, max_pixels=MAX_PIXELS)
    except (Skip, MemoryError) as skip:
        raise UserError(f"{shown}: {skip or 'too large for this machine'}") from None
