"""Between pixels as files hold them (uint8) and as networks see them (float in [-1, 1])."""

import torch
from torch import Tensor


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Float pixels, clipped to [-1, 1] -> uint8 by rounding to the nearest level."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def as_frames(video: Tensor) -> Tensor:
    """Clips [B, C, T, H, W] -> their frames as images [B*T, C, H, W]."""
    return video.transpose(1, 2).flatten(0, 1)
