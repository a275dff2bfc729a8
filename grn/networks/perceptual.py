"""LPIPS on VGG features (Zhang et al. 2018), as a training loss and as a score, on torchmetrics' network."""

import http.client
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS

from grn.runtime.downloads import impatient
from grn.runtime.errors import UserError
from grn.weights.reading import read_untrusted


class LPIPS(nn.Module):
    """Mean perceptual distance of two batches of images, both float [N, 3, H, W] in [-1, 1]; a float32 scalar.

    Args:
        weights: a file with torchvision's VGG16 weights (`vgg16-397923af.pth`); None takes torch hub's cache, or
            downloads it.
        key: the config key of `weights`, for errors.
        remedy: what else errors advise.

    Raises:
        UserError: the weights are neither there nor to be had, or damaged.
    """

    def __init__(
        self,
        weights: str | None = None,
        *,
        key: str = "training.perceptual.weights",
        remedy: str = "turn the loss off with training.perceptual_weight=0",
    ):
        super().__init__()
        state = None
        if weights is not None:
            path = Path(weights).expanduser()
            if not path.is_file():
                raise UserError(f"{key}: no file {path}; give that of vgg16-397923af.pth, or {remedy}")
            state = read_untrusted(path, f"{key}: {path} cannot be read: download it again", mmap=True)
        try:
            with impatient():
                self.network = _LPIPS(net="vgg", pnet_rand=weights is not None)
        except (OSError, http.client.HTTPException, pickle.UnpicklingError, EOFError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{key}: VGG16 can be neither downloaded nor read from torch hub's cache in {torch.hub.get_dir()} "
                f"({reason}); give the path of vgg16-397923af.pth, or {remedy}"
            ) from None
        if weights is not None and not self._load_backbone(state):
            raise UserError(f"{key}: {path} does not hold torchvision's VGG16")
        self.eval().requires_grad_(False)

    def _load_backbone(self, state: object) -> bool:
        """Takes the weights of torchvision's VGG16 out of `state`; whether they are there."""
        state = state if isinstance(state, dict) else {}
        # torchmetrics cuts VGG's `features` into slices and keeps the layers' numbers as names.
        own = self.network.net.state_dict()
        given: dict[str, Any] = {name: state.get(f"features.{name.split('.', 1)[1]}") for name in own}
        if any(not isinstance(given[name], Tensor) or given[name].shape != own[name].shape for name in own):
            return False
        self.network.net.load_state_dict(given)
        return True

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.distances(first, second).mean()

    def distances(self, first: Tensor, second: Tensor) -> Tensor:
        """The distance of each pair, float32 [N], also under autocast; arguments as in `forward`."""
        with torch.autocast(first.device.type, enabled=False):
            return self.network(first.float(), second.float()).flatten()
