"""Features of images by torch-fidelity's extractors, and their mean and covariance."""

import http.client
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch
import torchmetrics
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from grn.runtime.downloads import impatient
from grn.runtime.errors import UserError

INCEPTION = "inception-v3-compat"  # Inception v3 with the weights that FID was defined by


class FeatureStatistics(torchmetrics.Metric):
    """Mean and covariance of features over any batches and ranks, summed in float64.

    `compute` gives `n` (int64 scalar), `mu` float64 [width] and `sigma` float64 [width, width] with divisor n - 1, as
    `numpy.cov` and `torch_fidelity.metric_fid.fid_features_to_statistics` have it. (That one takes the mean in float32,
    so `mu` agrees with it to float32 precision and with the float64 mean to float64 precision.)

    Args:
        width: the number of features.
        over_ranks: False for statistics of a set that every rank sees whole.
    """

    full_state_update = False
    n: Tensor
    sum: Tensor
    outer: Tensor

    def __init__(self, width: int, *, over_ranks: bool = True):
        super().__init__(sync_on_compute=over_ranks)
        self.add_state("n", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("sum", default=torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", default=torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Adds features [B, width] of any floating dtype."""
        features = features.detach().to(self.sum.device, torch.float64)
        # Not in place: the states may have been made in inference mode, by a callback of a validation epoch.
        self.n = self.n + len(features)
        self.sum = self.sum + features.sum(dim=0)
        self.outer = self.outer + features.T @ features

    def compute(self) -> dict[str, Tensor]:
        mu = self.sum / self.n
        return {"n": self.n, "mu": mu, "sigma": (self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)}


def build_extractor(
    name: str, features: Sequence[str], *, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractorBase:
    """A feature extractor out of torch-fidelity's registry, frozen, on `device`.

    It maps uint8 [B, 3, H, W] to a tuple of float32 [B, width], one for each of `features`.

    Args:
        name: a registered name, such as `inception-v3-compat`.
        features: which of its features to give, each once.
        weights: local path of its weights; None lets torch-fidelity download them.

    Raises:
        UserError: an unknown name or feature, no weights file, or weights that do not belong to the extractor.
    """
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        known = ", ".join(FEATURE_EXTRACTORS_REGISTRY)
        raise UserError(f"scores.fid.extractor: {name!r} is not registered with torch-fidelity; choose among {known}")
    provided = FEATURE_EXTRACTORS_REGISTRY[name].get_provided_features_list()
    for feature in features:
        if feature not in provided:
            raise UserError(
                f"scores.fid.features: {name} has no features {feature!r}; choose among {', '.join(provided)}"
            )
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"scores.fid.weights: no such file: {weights}")
    try:
        with _tensors_only(), impatient():
            extractor = create_feature_extractor(
                name,
                list(features),
                cuda=False,  # torch-fidelity knows no other device; ours is set below
                verbose=False,
                feature_extractor_weights_path=None if weights is None else str(weights),
            )
    except (pickle.UnpicklingError, EOFError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        if weights is None:
            raise
        raise UserError(
            f"scores.fid.weights: {weights} is not a weights file of {name}: {_first_line(error)}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        if weights is not None:
            raise UserError(f"scores.fid.weights: {weights} cannot be read: {_first_line(error)}") from error
        file = "its torch-fidelity weights file"
        if name == INCEPTION:
            file = f"{PurePosixPath(URL_INCEPTION_V3).name} ({URL_INCEPTION_V3})"
        raise UserError(
            f"scores.fid.weights: the weights of {name} cannot be downloaded ({_first_line(error)}); "
            f"give the local path of {file}"
        ) from error
    return extractor.to(device).eval()


@torch.no_grad()
def extract(extractor: FeatureExtractorBase, images: Tensor) -> dict[str, Tensor]:
    """Features of images uint8 [B, 3, H, W]: a float32 [B, width] for each feature the extractor was built with.

    Always in the extractor's own precision, also when the caller runs under autocast.
    """
    device = next(iter(extractor.parameters())).device
    with torch.autocast(device.type, enabled=False):
        return extractor.convert_features_tuple_to_dict(extractor(images.to(device)))


class SpatialFeatures:
    """The spatial features of sFID (Nash et al., arXiv 2103.03841): of Inception's seventh block (TensorFlow's
    `mixed_6/conv`, `Mixed_6d.branch1x1` here) the first 7 channels of 17x17, in ADM's order.

    Args:
        extractor: Inception v3 of torch-fidelity, whose calls this listens to.

    Raises:
        UserError: the extractor is another one.
    """

    CHANNELS = 7

    def __init__(self, extractor: FeatureExtractorBase):
        try:
            branch = extractor.get_submodule("Mixed_6d.branch1x1")
        except AttributeError:
            raise UserError(
                f"scores.fid.sfid reads spatial features of {INCEPTION}, which scores.fid.extractor="
                f"{extractor.get_name()} has not: leave it out"
            ) from None
        self._last: Tensor | None = None
        branch.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._last = output[:, : self.CHANNELS].permute(0, 2, 3, 1).flatten(1).float()

    def take(self) -> Tensor:
        """Of the images that `extract` got last: float32 [B, 17 * 17 * 7]."""
        taken, self._last = self._last, None
        assert taken is not None  # `extract` comes before
        return taken


def widths(extractor: FeatureExtractorBase) -> dict[str, int]:
    """The width of each feature the extractor was built with."""
    return {name: value.shape[1] for name, value in extract(extractor, extractor.get_dummy_input_for_compile()).items()}


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Makes `torch.load` refuse anything but tensors: torch-fidelity asks it for free unpickling of its weights."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
