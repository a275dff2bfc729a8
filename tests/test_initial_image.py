import numpy as np
import pytest
import torch
from PIL import Image
from test_generation import tiny_module

from grn.data.samples import center_crop, to_tensor
from grn.errors import UserError
from grn.generation import equal_labels, generate
from grn.initial_image import positions_to_redraw, start_from_image
from grn.sampler import Linear, Sampler


@pytest.fixture
def module():
    return tiny_module(Sampler(Linear(4)))


@pytest.fixture
def picture(tmp_path):
    """Wider than high, and no multiple of the 16 pixels of the samples."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 54, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def painted(path, size, box=None):
    mask = Image.new("L", size, 0)
    if box is not None:
        mask.paste(255, box)
    mask.save(path)
    return path


def test_the_image_is_brought_to_size_as_data_are(module, picture):
    start = start_from_image(module, picture)
    image = to_tensor(center_crop(Image.open(picture), 16))[None]
    assert torch.equal(start.tokens, module.tokenize({"pixels": image}))
    assert start.tokens.shape == (1, *module.token_shape)
    assert (start.strength, start.redraw) == (0.6, None)
    assert start_from_image(module, None) is None


def test_a_token_is_redrawn_where_any_pixel_is_white(module, picture, tmp_path):
    mask = painted(tmp_path / "mask.png", (54, 40), (7 + 10, 29, 7 + 11, 31))  # in the centre square: x 10, y 29..30
    start = start_from_image(module, picture, mask=mask)
    assert start.strength == 1.0
    assert start.redraw.shape == (1, 1, 1, 4, 4)
    assert start.redraw[0, 0, 0].nonzero().tolist() == [[2, 1], [3, 1]]
    assert not positions_to_redraw(Image.new("RGB", (54, 40)), (4, 4)).any()
    assert positions_to_redraw(Image.new("RGB", (3, 3), "white"), (4, 4)).all()
    for x in range(40):  # no pixel of an odd size is lost
        lone = Image.new("L", (41, 41))
        lone.putpixel((x, 40 - x), 255)
        assert positions_to_redraw(lone, (4, 4)).any()


def test_samples_from_an_image(module, picture, tmp_path):
    labels = equal_labels(5, range(5))

    def tokens(**start):
        start = start_from_image(module, picture, **start)
        batches = list(generate(module, labels, batch_size=2, seed=3, start=start))
        return torch.cat([b.refined.tokens for b in batches])[torch.cat([b.ids for b in batches]).argsort()]

    (plain,) = generate(module, labels, batch_size=5, seed=3)
    assert torch.equal(tokens(strength=1), plain.refined.tokens)
    init = start_from_image(module, picture).tokens
    assert torch.equal(tokens(mask=painted(tmp_path / "black.png", (54, 40))), init.expand(5, -1, -1, -1, -1))
    assert torch.equal(tokens(mask=painted(tmp_path / "white.png", (54, 40), (0, 0, 54, 40))), plain.refined.tokens)
    half = tokens(mask=painted(tmp_path / "half.png", (54, 40), (0, 0, 27, 40)), strength=0.7)
    assert torch.equal(half[..., 2:], init.expand(5, -1, -1, -1, -1)[..., 2:])
    assert (half != init)[..., :2].any()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"init": None, "mask": "mask.png"}, "^mask=mask.png .*init=image.png"),
        ({"init": None, "strength": 0.5}, "^strength=0.5 .*init=image.png"),
        ({"init": "nowhere.png"}, "^init=.*nowhere.png: there is no such file"),
        ({"init": "text.png"}, "^init=.*text.png: image cannot be decoded"),
        ({"init": "text.txt"}, "^init=.*text.txt: give one of png"),
        ({"mask": "nowhere.png"}, "^mask=.*nowhere.png: there is no such file"),
        ({"mask": "small.png"}, r"^mask=.*small.png is 10x10, but init=.* is 54x40: make both of one size"),
        ({"strength": 0}, "^strength must be above 0 and at most 1, got 0"),
        ({"strength": 1.01}, "^strength must be above 0 and at most 1, got 1.01"),
        ({"strength": "much"}, "^strength=much must be a number"),
    ],
)
def test_mistakes_take_one_line(module, picture, tmp_path, arguments, complaint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    painted(tmp_path / "small.png", (10, 10))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.txt").write_text("no image")
    with pytest.raises(UserError, match=complaint) as error:
        start_from_image(module, **{"init": str(picture)} | arguments)
    assert "\n" not in str(error.value)
