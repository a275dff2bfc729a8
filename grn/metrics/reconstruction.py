"""Reconstruction scores: PSNR, SSIM, L1; LPIPS (Zhang et al. 2018)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from grn.media.pixels import from_uint8
from grn.metrics.ranks import Totals
from grn.metrics.splits import Split
from grn.networks.perceptual import LPIPS
from grn.runtime.errors import UserError


class ReconstructionScores:
    """PSNR, SSIM and L1 of reconstructions, each the mean over the images of the image's own score.

    Both images are uint8, so the reconstruction has been rounded as a viewer sees it.
    - `psnr` in dB: 10·log10(255² / mse) over the values of an image. An exact copy, whose PSNR is infinite, counts as
      if one value were off by one level, so that it does not drown the mean.
    - `ssim` by torchmetrics, with its defaults (Gaussian window of 11, sigma 1.5), over the range 0..255.
    - `l1`: mean absolute difference on the networks' scale, [-1, 1].

    Args:
        device: where the scores are computed.
        train, val, cache_dir: not used.
    """

    def __init__(
        self,
        *,
        train: Split | None = None,
        val: Split | None = None,
        device: torch.device | str = "cpu",
        cache_dir: str | Path | None = None,
    ):
        self.sums = Totals(4, dtype=torch.float64).to(device)  # images, psnr, ssim, l1

    @torch.no_grad()
    def update(self, real: Tensor, reconstructed: Tensor) -> None:
        """Adds pairs of images, uint8 [B, 3, H, W] each.

        Raises:
            UserError: images that are not uint8 or not of one shape.
        """
        if real.shape != reconstructed.shape or real.dtype != torch.uint8 or reconstructed.dtype != torch.uint8:
            raise UserError(
                "reconstruction scores compare uint8 images of one shape, got "
                f"{real.dtype} {list(real.shape)} and {reconstructed.dtype} {list(reconstructed.shape)}"
            )
        real, reconstructed = (x.to(self.sums.device, torch.float32) for x in (real, reconstructed))
        difference = (real - reconstructed).to(torch.float64).flatten(1)
        mse = difference.square().mean(dim=1).clamp(min=1 / difference.shape[1])
        psnr = 10 * torch.log10(255**2 / mse)
        with torch.autocast(real.device.type, enabled=False):
            ssim: Any = structural_similarity_index_measure(reconstructed, real, data_range=255.0, reduction="none")
        l1 = difference.abs().mean(dim=1) * 2 / 255
        scores = (torch.ones_like(psnr), psnr, ssim.reshape(-1).to(torch.float64), l1)
        self.sums.update(torch.stack([score.sum() for score in scores]))

    def compute(self) -> dict[str, float]:
        """The scores of all pairs given since the last `reset`, over all ranks; every rank must call it.

        Raises:
            UserError: no pair was given.
        """
        n, *sums = self.sums.compute().tolist()
        if not n:
            raise UserError("reconstruction scores: no images to compare: the split is empty")
        return {name: total / n for name, total in zip(("psnr", "ssim", "l1"), sums)}

    def reset(self) -> None:
        """Forgets all pairs."""
        self.sums.reset()


class TemporalPSNR:
    """`temporal_psnr` of reconstructed clips in dB: the PSNR of the changes from each frame to the next.

    10·log10(255² / mse) over all changes of a clip, mean over the clips; exact ones as in `ReconstructionScores`.
    Flicker that frames by themselves do not show lowers it.

    Args:
        device: where it is computed.
    """

    def __init__(self, *, device: torch.device | str = "cpu"):
        self.sums = Totals(2, dtype=torch.float64).to(device)  # clips, psnr

    @torch.no_grad()
    def update(self, real: Tensor, reconstructed: Tensor) -> None:
        """Adds pairs of clips, uint8 [B, 3, T, H, W] each; images, T = 1, have no changes and are passed over."""
        if real.shape[2] == 1:
            self.sums.update(torch.zeros(2, dtype=torch.float64, device=self.sums.device))
            return
        real, reconstructed = (x.to(self.sums.device, torch.float32).diff(dim=2) for x in (real, reconstructed))
        difference = (real - reconstructed).to(torch.float64).flatten(1)
        mse = difference.square().mean(dim=1).clamp(min=1 / difference.shape[1])
        psnr = 10 * torch.log10(255**2 / mse)
        self.sums.update(torch.stack([torch.ones_like(psnr).sum(), psnr.sum()]))

    def compute(self) -> dict[str, float]:
        """The score of all pairs given since the last `reset`, over all ranks; {} where there were images alone."""
        n, total = self.sums.compute().tolist()
        return {"temporal_psnr": total / n} if n else {}

    def reset(self) -> None:
        """Forgets all pairs."""
        self.sums.reset()


class LPIPSScore:
    """`lpips`: perceptual distance of reconstructions on VGG features, mean over the images.

    Args:
        device: where it is computed.
        weights: a file with torchvision's VGG16 weights; None takes torch hub's cache, or downloads them.
        train, val, cache_dir: not used.

    Raises:
        UserError: the weights are neither there nor to be had.
    """

    def __init__(
        self,
        *,
        device: torch.device | str = "cpu",
        weights: str | None = None,
        train: Split | None = None,
        val: Split | None = None,
        cache_dir: str | Path | None = None,
    ):
        network = LPIPS(weights, key="scores.lpips.weights", remedy="leave the score out with ~scores.lpips")
        self.network = network.to(device)
        self.sums = Totals(2, dtype=torch.float64).to(device)  # images, distances

    @torch.no_grad()
    def update(self, real: Tensor, reconstructed: Tensor) -> None:
        """Adds pairs of images, uint8 [B, 3, H, W] each."""
        distances = self.network.distances(*(from_uint8(x.to(self.sums.device)) for x in (real, reconstructed)))
        self.sums.update(torch.stack([torch.ones_like(distances).sum(), distances.sum()]))

    def compute(self) -> dict[str, float]:
        """The score of all pairs given since the last `reset`, over all ranks; every rank must call it."""
        n, total = self.sums.compute().tolist()
        if not n:
            raise UserError("scores.lpips: no images to compare: the split is empty")
        return {"lpips": total / n}

    def reset(self) -> None:
        """Forgets all pairs."""
        self.sums.reset()
