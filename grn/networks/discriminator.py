"""The patch discriminator and the hinge losses of tokenizer training (DESIGN 1.2)."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grn.errors import UserError


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of each frame (PatchGAN of pix2pix, Isola et al. 2017; 70 pixels wide by default).

    Args:
        layers: convolutions after the first; all of them but the last halve the resolution, as does the first.
        width: filters of the first convolution; doubled with each one after it, up to eight times.

    Raises:
        UserError: fewer than one layer or filter.
    """

    def __init__(self, *, layers: int = 3, width: int = 64):
        super().__init__()
        for name, value in {"layers": layers, "width": width}.items():
            if value < 1:
                raise UserError(f"{name} of the discriminator must be positive, got {value}")
        # Each halving convolution needs an even size; the two that do not halve take one pixel each.
        self.min_size = 3 * 2**layers
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        blocks = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < layers else 1
            blocks += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),  # the norm brings a bias
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2),
            ]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_init)

    def forward(self, video: Tensor) -> Tensor:
        """Float video [B, 3, T, H, W] in [-1, 1] -> logits [B, 1, T, h, w], high where a patch looks real.

        Raises:
            UserError: frames too small to hold one patch.
        """
        batch, _, _, height, width = video.shape
        if min(height, width) < self.min_size:
            raise UserError(
                f"frames of {height}x{width} are too small for the discriminator, which needs {self.min_size} pixels; "
                "give it fewer layers or set training.gan_weight=0"
            )
        frames = video.transpose(1, 2).flatten(0, 1)
        return self.blocks(frames).unflatten(0, (batch, -1)).transpose(1, 2)


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the mean hinges max(0, 1 - real) and max(0, 1 + fake), of logits of any shape; a float32 scalar."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Minus the mean of logits of any shape; a float32 scalar."""
    return -fake_logits.float().mean()


@torch.no_grad()
def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
