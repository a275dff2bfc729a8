"""Feature networks of FVD: I3D as TorchScript, or torchvision's, from local files."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from grn.media.pixels import from_uint8
from grn.runtime.errors import UserError
from grn.runtime.files import sha256_of
from grn.weights.reading import read_untrusted

KEY = "scores.fvd.network"
I3D_FILE = "i3d_torchscript.pt (https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt)"  # StyleGAN-V's
TORCHVISION = ("r3d_18", "mc3_18", "r2plus1d_18")
SIDE = 112  # pixels, of what torchvision's networks were trained on
_weights: Callable[[str], Any] = get_model_weights  # each of their enumerations has a DEFAULT


def video_network(name: str = "i3d", path: str | None = None, sha256: str | None = None) -> "I3D | TorchvisionVideo":
    """A frozen network: clips uint8 [B, 3, T, H, W] -> features float32 [B, width]; `min_frames` and `identity`.

    Args:
        name: `i3d`, or one of torchvision's `r3d_18`, `mc3_18`, `r2plus1d_18`.
        path: of its file. `i3d` is TorchScript, a program that is run: take it from whom you trust, or give `sha256`.
            torchvision's are weights, of which nothing is run.
        sha256: what the file's digest must be, in hexadecimal digits; None: anything.

    Raises:
        UserError: no such network, no file, another one than `sha256` tells, or not such a network's.
    """
    if name not in ("i3d", *TORCHVISION):
        raise UserError(f"{KEY}.name={name} must be one of i3d, {', '.join(TORCHVISION)}")
    wanted = I3D_FILE if name == "i3d" else f"torchvision's {name} ({_weights(name).DEFAULT.url})"
    if path is None:
        raise UserError(f"{KEY}.path must be given: the local path of {wanted}")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{KEY}.path: no file {file}; give the local path of {wanted}")
    digest = sha256_of(file)
    if sha256 is not None and digest != sha256.lower():
        raise UserError(f"{KEY}.sha256: {file} has {digest}: it differs from {KEY}.sha256={sha256}")
    network = I3D(file) if name == "i3d" else TorchvisionVideo(name, file)
    network.identity = f"{name} {digest}"
    return network.eval().requires_grad_(False)


class I3D(nn.Module):
    """Two-stream inflated 3-D ConvNet on RGB (Carreira and Zisserman, arXiv 1705.07750), trained on Kinetics-400.

    Its features are the logits, 400 wide, as FVD has them (Unterthiner et al., arXiv 1812.01717).

    Args:
        path: TorchScript that is called with float [B, 3, T, H, W] in [-1, 1] and `rescale`, `resize`,
            `return_features`, and resizes frames to its 224x224 itself. Loading and calling it run what it says.

    Raises:
        UserError: it is no TorchScript.
    """

    min_frames = 10
    identity = ""

    def __init__(self, path: Path):
        super().__init__()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # that there are newer formats: the field's file is this
                self.network = torch.jit.load(str(path), map_location="cpu")
        except Exception as error:  # of several kinds, with C++'s stack in their words
            raise UserError(f"{KEY}.path: {path} cannot be read as TorchScript ({type(error).__name__})") from None

    def forward(self, clips: Tensor) -> Tensor:
        return self.network(from_uint8(clips), rescale=False, resize=True, return_features=True)


class TorchvisionVideo(nn.Module):
    """One of torchvision's 18-layer networks (Tran et al., arXiv 1711.11248): 512 features, before the last layer.

    Frames are resized to 112x112 and normalized as the network's own transforms do; of these, the cut of the center is
    left out, so that the whole frame counts.

    Args:
        name: of the network.
        path: its state dict, such as torchvision's r3d_18-b3b3357e.pth; its classes do not matter.

    Raises:
        UserError: it is no such state dict.
    """

    min_frames = 1
    identity = ""

    def __init__(self, name: str, path: Path):
        super().__init__()
        self.network = get_model(name, weights=None)
        self.network.fc = nn.Identity()
        self.transforms = _weights(name).DEFAULT.transforms(crop_size=(SIDE, SIDE), resize_size=(SIDE, SIDE))
        state = read_untrusted(path, f"{KEY}.path: {path} cannot be read: download it again", mmap=True)
        try:
            state = {key: value for key, value in state.items() if not key.startswith("fc.")}
            self.network.load_state_dict(state)
        except (AttributeError, TypeError, RuntimeError):
            raise UserError(f"{KEY}.path: {path} does not hold torchvision's {name}") from None

    def forward(self, clips: Tensor) -> Tensor:
        return self.network(self.transforms(clips.transpose(1, 2).contiguous()))
