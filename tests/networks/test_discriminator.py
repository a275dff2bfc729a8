import pytest
import torch
from torch import nn

from grn.networks.discriminator import PatchDiscriminator, generator_loss, hinge_discriminator_loss
from grn.runtime.errors import UserError


def test_layers_of_the_reference_size():
    discriminator = PatchDiscriminator()
    convolutions = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0]) for c in convolutions] == [
        (3, 64, 2), (64, 128, 2), (128, 256, 2), (256, 512, 1), (512, 1, 1)
    ]  # fmt: skip
    assert sum(isinstance(m, nn.BatchNorm2d) for m in discriminator.modules()) == 3
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633


def test_initial_weights():
    torch.manual_seed(0)
    for module in PatchDiscriminator().requires_grad_(False).modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std() == pytest.approx(0.02, rel=0.1)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean() == pytest.approx(1.0, abs=0.01)
            assert module.weight.std() == pytest.approx(0.02, rel=0.2)
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any()


@pytest.mark.parametrize(("frames", "size", "patches"), [(1, 256, 30), (3, 32, 2), (1, 24, 1)])
@torch.no_grad()
def test_shapes(frames, size, patches):
    discriminator = PatchDiscriminator(width=4)
    assert discriminator(torch.rand(2, 3, frames, size, size)).shape == (2, 1, frames, patches, patches)


@torch.no_grad()
def test_frames_are_judged_one_by_one():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=4).eval()
    video = torch.rand(2, 3, 3, 32, 32)
    alone = torch.cat([discriminator(video[:, :, i : i + 1]) for i in range(3)], dim=2)
    torch.testing.assert_close(discriminator(video), alone)


@pytest.mark.parametrize("layers", [1, 2, 3])
@torch.no_grad()
def test_smallest_frame(layers):
    discriminator = PatchDiscriminator(layers=layers, width=2)
    smallest = discriminator.min_size
    assert discriminator(torch.rand(2, 3, 1, smallest, smallest)).shape[-2:] == (1, 1)
    with pytest.raises(UserError, match=f"{smallest - 1}x{smallest} are too small .* needs {smallest} pixels"):
        discriminator(torch.rand(2, 3, 1, smallest - 1, smallest))
    with pytest.raises(RuntimeError):
        discriminator.blocks(torch.rand(2, 3, smallest - 1, smallest))


@pytest.mark.parametrize("sizes", [{"layers": 0}, {"width": 0}])
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(UserError, match=rf"training\.discriminator\.{next(iter(sizes))}=0 must be a whole number"):
        PatchDiscriminator(**sizes)


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0, 1.0]), torch.tensor([-3.0, 0.0])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * ((0.5 + 2.0) / 4 + 1.0 / 2))
    assert generator_loss(fake).item() == pytest.approx(1.5)


def test_hinge_gradients_stop_beyond_the_margin():
    real = torch.tensor([2.0, 0.5], requires_grad=True)
    fake = torch.tensor([-2.0, -0.5], requires_grad=True)
    hinge_discriminator_loss(real, fake).backward()
    assert real.grad.tolist() == [0, -0.25]
    assert fake.grad.tolist() == [0, 0.25]


def test_losses_are_float32():
    logits = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert hinge_discriminator_loss(logits, logits).dtype == torch.float32
    assert generator_loss(logits).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert hinge_discriminator_loss(logits, logits).dtype == torch.float32


def test_learns_to_tell_real_from_fake():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(layers=2, width=8)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3)
    real, fake = torch.rand(4, 3, 1, 16, 16), torch.zeros(4, 3, 1, 16, 16)
    losses = []
    for _ in range(30):
        loss = hinge_discriminator_loss(discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert generator_loss(discriminator(fake)) > generator_loss(discriminator(real))


@pytest.mark.parametrize(("frames", "judged"), [(1, 1), (5, 2), (9, 3), (33, 9)])
@torch.no_grad()
def test_three_dimensions_judge_clips_and_images(frames, judged):
    discriminator = PatchDiscriminator(width=2, layers=2, dimensions=3)
    assert discriminator(torch.rand(2, 3, frames, 24, 32)).shape == (2, 1, judged, 4, 6)


@torch.no_grad()
def test_three_dimensions_see_movement():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=4, layers=1, dimensions=3).eval()
    clip = torch.rand(1, 3, 5, 16, 16)
    still = clip[:, :, :1].expand_as(clip)
    assert (discriminator(still)[:, :, 1] - discriminator(clip[:, :, [0, 1, 2, 3, 0]])[:, :, 1]).abs().max() > 1e-4
    convolutions = [m for m in discriminator.modules() if isinstance(m, nn.Conv3d)]
    assert all(0.01 < c.weight.std() < 0.03 for c in convolutions)


def test_other_dimensions():
    with pytest.raises(UserError, match="must be 2 or 3, got 4"):
        PatchDiscriminator(dimensions=4)
