"""The patch discriminator and hinge losses of tokenizer training."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grn.media.pixels import as_frames
from grn.runtime.errors import UserError, check_count


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches (PatchGAN of pix2pix, Isola et al. 2017; 70 pixels wide by default).

    Args:
        layers: convolutions after the first; all of them but the last halve the resolution, as does the first.
        width: filters of the first convolution; doubled with each one after it, up to eight times.
        dimensions: 2 judges each frame by itself; 3 judges movement too, by kernels over three frames that halve time
            where they halve height and width. An image is a clip of one frame to either.

    Raises:
        UserError: fewer than one layer or filter, or other dimensions.
    """

    def __init__(self, *, layers: int = 3, width: int = 64, dimensions: int = 2):
        super().__init__()
        for name, value in {"layers": layers, "width": width}.items():
            check_count(f"training.discriminator.{name}", value)
        if dimensions not in (2, 3):
            raise UserError(f"dimensions of the discriminator must be 2 or 3, got {dimensions}")
        self.dimensions = dimensions
        # Each halving convolution needs an even size; the two that do not halve take one pixel each.
        self.min_size = 3 * 2**layers
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        blocks = [self._convolution(3, width, stride=2), nn.LeakyReLU(0.2)]
        norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimensions]
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < layers else 1
            blocks += [
                self._convolution(before, after, stride=stride, bias=False),  # the norm brings a bias
                norm(after),
                nn.LeakyReLU(0.2),
            ]
        self.blocks = nn.Sequential(*blocks, self._convolution(widths[-1], 1, stride=1))
        self.apply(_init)

    def _convolution(self, before: int, after: int, *, stride: int, bias: bool = True) -> nn.Module:
        if self.dimensions == 2:
            return nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=bias)
        return nn.Conv3d(before, after, (3, 4, 4), stride=stride, padding=1, bias=bias)

    def forward(self, video: Tensor) -> Tensor:
        """Float video [B, 3, T, H, W] in [-1, 1] -> logits [B, 1, T', h, w], high where a patch looks real.

        T' is T in two dimensions; in three, time is halved like height and width, rounded up.

        Raises:
            UserError: frames too small to hold one patch.
        """
        batch, _, _, height, width = video.shape
        if min(height, width) < self.min_size:
            raise UserError(
                f"frames of {height}x{width} are too small for the discriminator, which needs {self.min_size} pixels; "
                "give it fewer layers or set training.gan_weight=0"
            )
        if self.dimensions == 3:
            return self.blocks(video)
        return self.blocks(as_frames(video)).unflatten(0, (batch, -1)).transpose(1, 2)


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the mean hinges max(0, 1 - real) and max(0, 1 + fake), of logits of any shape; a float32 scalar."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Minus the mean of logits of any shape; a float32 scalar."""
    return -fake_logits.float().mean()


@torch.no_grad()
def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        nn.init.zeros_(bias)
