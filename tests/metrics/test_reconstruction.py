import math

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image import StructuralSimilarityIndexMeasure

from grn.metrics.reconstruction import ReconstructionScores, TemporalPSNR
from grn.runtime.errors import UserError


@pytest.fixture
def pairs(digits):
    """Real images and reconstructions of very different quality, uint8 [30, 3, 32, 32]."""
    real = digits["val"][0][:30]
    size = torch.linspace(2, 40, 30).view(-1, 1, 1, 1)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0)) * size
    return real, (real + noise).round().clamp(0, 255).to(torch.uint8)


def test_scores_are_means_over_images(pairs):
    real, reconstructed = pairs
    scores = ReconstructionScores()
    for a, b in zip(real.split(7), reconstructed.split(7)):
        scores.update(a, b)
    values = scores.compute()
    psnr = [
        peak_signal_noise_ratio(b.double(), a.double(), data_range=255.0).item() for a, b in zip(real, reconstructed)
    ]
    assert values["psnr"] == pytest.approx(sum(psnr) / 30, rel=1e-6)
    ssim = StructuralSimilarityIndexMeasure(data_range=255.0)(reconstructed.float(), real.float()).item()
    assert values["ssim"] == pytest.approx(ssim, rel=1e-5)
    a, b = (x.double() / 127.5 - 1 for x in pairs)
    assert values["l1"] == pytest.approx((a - b).abs().mean().item(), rel=1e-6)
    # The PSNR of the pooled error is another number: it weighs the bad images more.
    assert values["psnr"] > peak_signal_noise_ratio(b, a, data_range=2.0).item() + 1


def test_psnr_of_a_known_error():
    real = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    scores = ReconstructionScores()
    scores.update(real, real + 255)
    assert scores.compute()["psnr"] == pytest.approx(0)
    assert scores.compute()["l1"] == pytest.approx(2)
    scores.reset()
    scores.update(real, real + 5)
    assert scores.compute()["psnr"] == pytest.approx(20 * math.log10(255 / 5))


def test_an_exact_copy_is_finite(digits):
    real = digits["val"][0][:4]
    scores = ReconstructionScores()
    scores.update(real, real)
    values = scores.compute()
    assert values["psnr"] == pytest.approx(10 * math.log10(255**2 * 3 * 32 * 32))
    assert values["ssim"] == pytest.approx(1)
    assert values["l1"] == 0


def test_autocast_changes_nothing(pairs):
    plain, mixed = ReconstructionScores(), ReconstructionScores()
    plain.update(*pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed.update(*pairs)
    assert mixed.compute() == plain.compute()


def test_bad_input_is_one_line(pairs):
    scores = ReconstructionScores()
    with pytest.raises(UserError, match="no images"):
        scores.compute()
    with pytest.raises(UserError, match="uint8 images of one shape"):
        scores.update(pairs[0], pairs[1].float())
    with pytest.raises(UserError, match="uint8 images of one shape"):
        scores.update(pairs[0], pairs[1][:2])


def test_temporal_psnr_hears_of_flicker_alone():
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(20, 200, (3, 3, 6, 8, 8), dtype=torch.uint8, generator=generator)
    scores = TemporalPSNR()
    scores.update(real[:, :, :1], real[:, :, :1])
    assert scores.compute() == {}
    scores.update(real, real + 9)  # another brightness, and no flicker
    exact = scores.compute()["temporal_psnr"]
    assert exact == pytest.approx(10 * math.log10(255**2 * real[0, :, 1:].numel()))
    scores.reset()
    flicker = (torch.arange(6) % 2 * 10).to(torch.uint8).view(-1, 1, 1)
    scores.update(real, real + flicker)  # every change is off by ten
    assert scores.compute()["temporal_psnr"] == pytest.approx(20 * math.log10(25.5))
