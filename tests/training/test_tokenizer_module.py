import pytest
import torch
from lightning import Trainer
from torch import nn

from grn.networks.discriminator import PatchDiscriminator
from grn.networks.tokenizer import HBQTokenizer
from grn.training import TokenizerModule


def network():
    torch.manual_seed(0)
    return HBQTokenizer(
        latent_channels=4, rounds=4, dim=8, decoder_dim=8, multipliers=(1, 2), blocks_per_stage=1, temporal=(False,)
    )


class Distance(nn.Module):
    """Stands for LPIPS: differentiable, with a weight that must not be trained."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, first, second):
        assert first.ndim == second.ndim == 4
        return self.weight * (first - second).square().mean()


def batches(count=6, frames=1):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (count, 4, 3, frames, 32, 32), dtype=torch.uint8, generator=generator)
    return [{"pixels": p} for p in pixels]


def fit(folder, module, *, steps=6, precision="32-true"):
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0,
        log_every_n_steps=1, precision=precision,
    )  # fmt: skip
    data = batches(steps)
    trainer.fit(
        module,
        torch.utils.data.DataLoader(data, batch_size=None),
        torch.utils.data.DataLoader(data[:2], batch_size=None),
    )
    return trainer


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(before, after, prefix):
    return {name for name in before if name.startswith(prefix) and not torch.equal(before[name], after[name])}


def test_all_three_losses_and_both_optimisers(tmp_path):
    module = TokenizerModule(network(), PatchDiscriminator(), Distance(), learning_rate=1e-3)
    before = weights(module)
    trainer = fit(tmp_path, module)
    after = weights(module)
    assert trainer.global_step == 6  # the discriminator's steps are not counted
    assert changed(before, after, "network.")
    assert changed(before, after, "discriminator.")
    assert not changed(before, after, "perceptual.")
    logged = trainer.callback_metrics
    assert {"train/l1", "train/lpips", "train/gan", "train/discriminator", "val/psnr", "val/ssim"} <= logged.keys()
    torch.testing.assert_close(logged["train/loss"], logged["train/l1"] + logged["train/lpips"] + logged["train/gan"])
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    contents = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert len(contents["optimizer_states"]) == 2
    assert not [name for name in contents["state_dict"] if name.startswith("perceptual.")]


def test_the_gan_waits_for_its_start(tmp_path):
    module = TokenizerModule(network(), PatchDiscriminator(), perceptual_weight=0.0, gan_start=4, learning_rate=1e-3)
    before = weights(module)
    fit(tmp_path, module, steps=4)
    assert not changed(before, weights(module), "discriminator.")
    module.gan_start = 2
    fit(tmp_path, module, steps=4)
    assert changed(before, weights(module), "discriminator.")


def test_weights_of_zero_build_nothing(tmp_path):
    module = TokenizerModule(network(), perceptual_weight=0.0, gan_weight=0.0, learning_rate=1e-3)
    assert module.discriminator is None
    assert module.perceptual is None
    trainer = fit(tmp_path, module)
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], trainer.callback_metrics["train/l1"])


def test_bfloat16_ends_near_float32(tmp_path):
    """Losses, optimiser and weights stay in float32; the first steps of both are the same within bfloat16's grain."""
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        module = TokenizerModule(network(), PatchDiscriminator(width=8), Distance(), learning_rate=1e-3)
        logged = fit(tmp_path, module, precision=precision).callback_metrics
        assert logged["train/loss"].dtype == logged["train/gan"].dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in module.parameters())
        losses.append([logged[f"train/{name}"].item() for name in ("l1", "lpips")])
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    assert losses[0] != losses[1]


def test_reconstruction_goes_through_the_quantizer():
    module = TokenizerModule(network(), perceptual_weight=0.0, gan_weight=0.0).eval()
    pixels = batches(1)[0]["pixels"]
    from_tokens = module.network.detokenize(module.network.tokenize(pixels.float() / 127.5 - 1, "bit"), "bit")
    expected = ((from_tokens.clamp(-1, 1) + 1) * 127.5).round()
    assert module.reconstruct(pixels).dtype == torch.uint8
    assert (module.reconstruct(pixels).float() - expected).abs().max() <= 1


@pytest.mark.parametrize("frames", [1, 5])
def test_clips_and_images(tmp_path, frames):
    torch.manual_seed(0)
    clips = HBQTokenizer(
        latent_channels=4, dim=8, decoder_dim=8, multipliers=(1, 1, 1), blocks_per_stage=1, temporal=(True, True)
    )
    module = TokenizerModule(clips, PatchDiscriminator(), perceptual_weight=0.0).eval()
    pixels = batches(1, frames)[0]["pixels"]
    assert module.reconstruct(pixels).shape == pixels.shape
