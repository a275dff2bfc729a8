"""LPIPS on VGG features (Zhang et al. 2018) as a training loss, on torchmetrics' network."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS

from grn.errors import UserError


class LPIPS(nn.Module):
    """Mean perceptual distance of two batches of images, both float [N, 3, H, W] in [-1, 1]; a float32 scalar.

    Args:
        weights: a file with torchvision's VGG16 weights (`vgg16-397923af.pth`); None takes torch hub's cache, or
            downloads it.

    Raises:
        UserError: the weights are neither there nor to be had.
    """

    def __init__(self, weights: str | None = None):
        super().__init__()
        try:
            self.network = _LPIPS(net="vgg", pnet_rand=weights is not None)
        except OSError as error:
            raise UserError(
                f"training.perceptual.weights: VGG16 cannot be downloaded ({error}); give the path of "
                "vgg16-397923af.pth, or turn the loss off with training.perceptual_weight=0"
            ) from None
        if weights is not None:
            self._load_backbone(Path(weights))
        self.eval().requires_grad_(False)

    def _load_backbone(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(
                f"training.perceptual.weights: no file {path}; or turn the loss off with training.perceptual_weight=0"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        # torchmetrics cuts VGG's `features` into slices and keeps the layers' numbers as names.
        own = self.network.net.state_dict()
        given = {name: state.get(f"features.{name.split('.', 1)[1]}") for name in own}
        if any(tensor is None or tensor.shape != own[name].shape for name, tensor in given.items()):
            raise UserError(f"training.perceptual.weights: {path} does not hold torchvision's VGG16")
        self.network.net.load_state_dict(given)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        with torch.autocast(first.device.type, enabled=False):
            return self.network(first.float(), second.float()).mean()
