"""What each round of HBQ adds to a picture: it is encoded once and decoded after 1, 2, ... M rounds."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from grn.media.images import resize_and_crop, to_rgb, to_tensor
from grn.media.pixels import from_uint8, to_uint8
from grn.media.skips import Skip
from grn.method import hbq
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError

MAX_SIDE = 1024  # pixels of a picture that keeps its own size


@dataclass(frozen=True)
class Reconstruction:
    """A picture after so many rounds.

    pixels: uint8 [3, H, W]. error: float32 [H, W], the mean over colors of the absolute difference to the original, in
    levels (0 to 255). psnr: in dB, over all values; infinite of an exact copy. bits: of all its tokens.
    """

    rounds: int
    pixels: Tensor
    error: Tensor
    psnr: float
    bits: int


def prepare(image: Image.Image, size: tuple[int, int] | None) -> Tensor:
    """A picture -> uint8 pixels [3, 1, H, W] as training data are brought to their size.

    Args:
        size: height and width in pixels; None: its own, made smaller where a side has more than `MAX_SIDE`.

    Raises:
        UserError: it is too narrow for that.
    """
    image = to_rgb(image)
    if size is None:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        return to_tensor(image)
    try:
        return to_tensor(resize_and_crop(image, *size))
    except Skip as skip:
        raise UserError(f"picture: {skip}") from None


@torch.no_grad()
def reconstructions(tokenizer: HBQTokenizer, pixels: Tensor) -> Iterator[Reconstruction]:
    """After 1, 2, ... M rounds. The decoder was trained on pictures of all M: with fewer it is left alone.

    Args:
        pixels: uint8 [3, 1, H, W], of any size.
    """
    device = next(tokenizer.parameters()).device
    video = from_uint8(pixels[None].to(device))
    features = tokenizer.encode(video, pad=True)
    for rounds in range(1, tokenizer.rounds + 1):
        decoded = tokenizer.decode(hbq.quantize(features, rounds), size=video.shape[2:])
        picture = to_uint8(decoded)[0, :, 0].cpu()
        difference = picture.float() - pixels[:, 0].float()
        mse = difference.square().mean().item()
        yield Reconstruction(
            rounds=rounds,
            pixels=picture,
            error=difference.abs().mean(dim=0),
            psnr=10 * math.log10(255**2 / mse) if mse else math.inf,
            bits=features[0].numel() * rounds,
        )


def error_map(error: Tensor, most: float) -> Image.Image:
    """Levels float [H, W] -> a picture from black (0) over orange to white (`most` levels and more)."""
    share = (error / max(most, 1.0)).clamp(0, 1).numpy()
    stops, colours = [0, 0.5, 1], np.array([(0, 0, 0), (213, 94, 0), (255, 255, 255)])
    painted = [np.interp(share, stops, colours[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(painted, axis=-1).round().astype(np.uint8))
