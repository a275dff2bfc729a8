"""What each round of HBQ adds to a picture."""

import math

import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

from grn.media.pixels import from_uint8, to_uint8
from grn.method import hbq
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError
from grn.web.rounds import error_map, prepare, reconstructions


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    sizes = {"latent_channels": 3, "rounds": 3, "dim": 4, "decoder_dim": 4, "multipliers": [1, 2], "temporal": [True]}
    return HBQTokenizer(**sizes, blocks_per_stage=1).eval()


@pytest.fixture
def pixels():
    return torch.randint(256, (3, 1, 13, 18), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_the_last_round_is_the_tokenizer_s_own_reconstruction(tokenizer, pixels):
    *_, last = reconstructions(tokenizer, pixels)
    video = from_uint8(pixels[None])
    with torch.no_grad():
        own = to_uint8(tokenizer(video, pad=True)[0])[0, :, 0]
    assert torch.equal(last.pixels, own)
    assert last.rounds == tokenizer.rounds == 3


def test_every_round_is_what_its_bits_alone_stand_for(tokenizer, pixels):
    bits = tokenizer.tokenize(from_uint8(pixels[None]), "bit", pad=True)
    for made in reconstructions(tokenizer, pixels):
        kept = bits[:, : 3 * made.rounds]  # round by round
        with torch.no_grad():
            video = tokenizer.decode(hbq.dequantize(kept, made.rounds, "bit"), size=(1, 13, 18))
        assert torch.equal(made.pixels, to_uint8(video)[0, :, 0])
        assert made.bits == kept[0].numel()
        assert made.pixels.shape == (3, 13, 18)


def test_the_error_is_measured_in_levels(tokenizer, pixels):
    for made in reconstructions(tokenizer, pixels):
        difference = made.pixels.float() - pixels[:, 0].float()
        torch.testing.assert_close(made.error, difference.abs().mean(dim=0))
        psnr = peak_signal_noise_ratio(made.pixels.float(), pixels[:, 0].float(), data_range=255.0).item()
        assert made.psnr == pytest.approx(psnr, abs=1e-4)


def test_an_exact_copy_has_an_infinite_psnr(tokenizer, pixels):
    class Perfect(torch.nn.Module):
        rounds = 1

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def encode(self, video, pad):
            self.video = video
            return video.new_zeros(1, 1, 1, 1, 1)

        def decode(self, features, size):
            return self.video

    (made,) = reconstructions(Perfect(), pixels)
    assert made.psnr == math.inf
    assert made.error.max() == 0


def test_pictures_are_brought_to_size_as_training_data_are():
    image = Image.new("RGBA", (400, 100), (0, 0, 0, 0))  # transparent: white
    assert prepare(image, (32, 32)).shape == (3, 1, 32, 32)
    assert prepare(image, (32, 32)).min() == 255
    assert prepare(image, None).shape == (3, 1, 100, 400)
    assert prepare(Image.new("L", (3000, 10)), None).shape[3] <= 1024
    with pytest.raises(UserError, match="picture: too many pixels"):
        prepare(Image.new("RGB", (60_000, 1)), (512, 512))


def test_error_maps_go_from_black_to_white():
    levels = torch.tensor([[0.0, 10.0, 20.0, 40.0]])
    painted = error_map(levels, most=20)
    assert [painted.getpixel((x, 0)) for x in range(4)] == [(0, 0, 0), (213, 94, 0), (255, 255, 255), (255, 255, 255)]
    assert error_map(torch.zeros(2, 2), most=0).getpixel((0, 0)) == (0, 0, 0)
