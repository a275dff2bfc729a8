import numpy as np
import pytest
import torch
from PIL import Image
from test_generation import tiny_bundle

from grn.media.images import center_crop, to_tensor
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.runtime.errors import UserError
from grn.sampling.generation import generate
from grn.sampling.request import Request
from grn.sampling.start_image import positions_to_redraw, start_from_image

SHAPE = (3, 1, 4, 4)


@pytest.fixture
def bundle():
    return tiny_bundle(Sampler(Linear(4)))


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


def test_the_image_is_brought_to_size_as_data_are(bundle, picture):
    start = start_from_image(bundle, picture, shape=SHAPE)
    image = to_tensor(center_crop(Image.open(picture), 16))[None]
    assert torch.equal(start.tokens, bundle.tokenize(image))
    assert start.tokens.shape == (1, *bundle.token_shape)
    assert (start.strength, start.redraw) == (0.6, None)
    assert start_from_image(bundle, None, shape=SHAPE) is None


def test_a_token_is_redrawn_where_any_pixel_is_white(bundle, picture, tmp_path):
    mask = painted(tmp_path / "mask.png", (54, 40), (7 + 10, 29, 7 + 11, 31))  # in the centre square: x 10, y 29..30
    start = start_from_image(bundle, picture, shape=SHAPE, mask=mask)
    assert start.strength == 1.0
    assert start.redraw.shape == (1, 1, 1, 4, 4)
    assert start.redraw[0, 0, 0].nonzero().tolist() == [[2, 1], [3, 1]]
    assert not positions_to_redraw(Image.new("RGB", (54, 40)), (4, 4)).any()
    assert positions_to_redraw(Image.new("RGB", (3, 3), "white"), (4, 4)).all()
    for x in range(40):  # no pixel of an odd size is lost
        lone = Image.new("L", (41, 41))
        lone.putpixel((x, 40 - x), 255)
        assert positions_to_redraw(lone, (4, 4)).any()


STROKES = (7, 0, 27, 40)  # the left half of the centre square


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_in_a_mask_is_not_drawn_anew(bundle, picture, tmp_path, mode, caplog):
    """As editors save a layer with white strokes: what lies below them may be white, too."""
    for hidden in (0, 255):
        layer = Image.new("RGBA", (54, 40), (hidden, hidden, hidden, 0))
        layer.paste((255, 255, 255, 255), STROKES)
        layer.paste((0, 0, 0, 255), (27, 0, 47, 20))  # painted black is kept, too
        if mode == "P":
            layer = layer.quantize(8)
        layer.convert(mode).save(tmp_path / "mask.png")
        for mask in (tmp_path / "mask.png", layer.convert(mode)):
            redraw = start_from_image(bundle, picture, shape=SHAPE, mask=mask).redraw
            assert redraw[0, 0, 0].tolist() == [[True, True, False, False]] * 4
    assert not caplog.text


def test_faint_strokes_count_from_half_on(bundle, picture, tmp_path):
    for alpha, drawn in ((127, False), (128, True)):
        Image.new("RGBA", (54, 40), (255, 255, 255, alpha)).save(tmp_path / "mask.png")
        assert start_from_image(bundle, picture, shape=SHAPE, mask=tmp_path / "mask.png").redraw.all() == drawn


def test_a_mask_of_everything_or_nothing_is_told(bundle, picture, tmp_path, caplog):
    start_from_image(bundle, picture, shape=SHAPE, mask=painted(tmp_path / "white.png", (54, 40), (0, 0, 54, 40)))
    Image.new("RGBA", (54, 40), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    start_from_image(bundle, picture, shape=SHAPE, mask=tmp_path / "clear.png")
    everything, nothing = [record.getMessage() for record in caplog.records]
    assert "white.png is white everywhere: the whole picture is redrawn" in everything
    assert "clear.png is white nowhere (transparent parts count as black): nothing is redrawn" in nothing


def test_transparent_parts_of_the_picture_show_white(bundle, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    pixels[..., 3] = np.where(pixels[..., 3] > 128, 255, 0)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "layer.png")
    pixels[pixels[..., 3] == 0] = 255
    Image.fromarray(pixels[..., :3]).save(tmp_path / "white.png")
    layer, white = (start_from_image(bundle, tmp_path / name, shape=SHAPE) for name in ("layer.png", "white.png"))
    assert torch.equal(layer.tokens, white.tokens)


def test_samples_from_an_image(bundle, picture, tmp_path):
    def tokens(**start):
        start = start_from_image(bundle, picture, shape=SHAPE, **start)
        batches = list(generate(bundle, Request(seed=3, start=start), batch_size=2))
        return torch.cat([b.refined.tokens for b in batches])[torch.cat([b.ids for b in batches]).argsort()]

    (plain,) = generate(bundle, Request(seed=3), batch_size=5)
    assert torch.equal(tokens(strength=1), plain.refined.tokens)
    init = start_from_image(bundle, picture, shape=SHAPE).tokens
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
        ({"mask": "small.png"}, r"^mask=.*small.png is 10x10, but init=.* is 54x40: give both the same size"),
        ({"strength": 0}, "^strength must be above 0 and at most 1, got 0"),
        ({"strength": 1.01}, "^strength must be above 0 and at most 1, got 1.01"),
        ({"strength": "much"}, "^strength=much must be a number"),
    ],
)
def test_mistakes_take_one_line(bundle, picture, tmp_path, arguments, complaint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    painted(tmp_path / "small.png", (10, 10))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.txt").write_text("no image")
    with pytest.raises(UserError, match=complaint) as error:
        start_from_image(bundle, shape=SHAPE, **{"init": str(picture)} | arguments)
    assert "\n" not in str(error.value)
