"""Decoding: every kind of image comes out as upright 8-bit RGB, every broken sample as a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from grn.data.samples import ImageDecoder, collate, read_captions
from grn.media.images import center_crop, decode_image, to_tensor
from grn.media.skips import Reason, Skip


def encoded(image, format="PNG", **options):
    data = io.BytesIO()
    image.save(data, format=format, **options)
    return data.getvalue()


def colours(height=4, width=4):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(size=8, colour=(10, 20, 30)):
    return encoded(Image.new("RGB", (size, size), colour))


def decoded(data):
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(raw, **arguments):
    with pytest.raises(Skip) as caught:
        ImageDecoder(**({"image_size": 8, "num_labels": 10} | arguments))({"__key__": "k", "__url__": "u"} | raw, 0)
    return caught.value.reason


def test_rgb_and_greyscale():
    pixels = colours()
    assert (decoded(encoded(Image.fromarray(pixels))) == pixels).all()
    assert (decoded(encoded(Image.fromarray(pixels), "WEBP", lossless=True)) == pixels).all()
    grey = decoded(encoded(Image.fromarray(pixels[..., 0])))
    assert (grey == pixels[..., :1]).all()
    bits = decoded(encoded(Image.fromarray(pixels[..., 0]).convert("1")))
    assert set(np.unique(bits)) <= {0, 255}


def test_palette():
    image = Image.fromarray(colours()).quantize(16)
    assert (decoded(encoded(image)) == np.asarray(image.convert("RGB"))).all()


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert decoded(encoded(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert decoded(encoded(image.convert(mode)))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_transparent_palette_entry_shows_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    assert decoded(encoded(image, transparency=1))[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_cmyk_jpeg():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(decoded(encoded(image, "JPEG")).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize(("orientation", "back"), [(1, 0), (8, 1), (3, 2), (6, 3)])
def test_exif_orientation(orientation, back):
    pixels = colours(2, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (decoded(encoded(Image.fromarray(pixels), exif=exif)) == np.rot90(pixels, back)).all()


def test_center_crop_leaves_its_size_alone():
    image = Image.fromarray(colours(8, 8))
    assert center_crop(image, 8) is image


def test_center_crop_halves_by_boxes():
    pixels = colours(17, 16)
    # 17x16 halves to 8x8 (the seventeenth row is averaged in by Pillow's box), where bicubic resizing changes nothing.
    expected = np.asarray(Image.fromarray(pixels).resize((8, 8), Image.Resampling.BOX))
    assert (np.asarray(center_crop(Image.fromarray(pixels), 8)) == expected).all()
    blocks = pixels[:16].reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    exact = np.asarray(center_crop(Image.fromarray(pixels[:16]), 8))
    assert np.abs(exact - blocks).max() <= 1  # Pillow rounds once along each axis


@pytest.mark.parametrize(("height", "width", "box"), [(8, 13, (2, 0)), (14, 8, (0, 3)), (8, 12, (2, 0))])
def test_center_crop_takes_the_middle(height, width, box):
    pixels = colours(height, width)
    left, top = box
    assert (np.asarray(center_crop(Image.fromarray(pixels), 8)) == pixels[top : top + 8, left : left + 8]).all()


def test_center_crop_enlarges_and_shrinks_bicubically():
    for size in (5, 13):
        image = Image.fromarray(colours(size, size))
        expected = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))
        assert (np.asarray(center_crop(image, 8)) == expected).all()


def test_center_crop_of_a_thread_is_bounded():
    with pytest.raises(Skip) as caught:
        center_crop(Image.new("RGB", (100_000, 1)), 256)
    assert caught.value.reason is Reason.TOO_MANY_PIXELS


def test_sample_from_all_members():
    pixels = colours(8, 8)
    raw = {"__key__": "k", "__url__": "u", "png": encoded(Image.fromarray(pixels)), "cls": b" 7\n"}
    raw["txt"] = " sieben Stück ".encode()
    sample = ImageDecoder(image_size=8, num_labels=10)(raw, 0)
    assert (sample["label"], sample["caption"], sample["key"]) == (7, "sieben Stück", "k")
    assert sample["pixels"].dtype == torch.uint8
    assert (sample["pixels"][:, 0].permute(1, 2, 0).numpy() == pixels).all()


def test_sample_from_json_and_without_labels():
    raw = {"__key__": "k", "__url__": "u", "jpg": encoded(Image.new("RGB", (8, 8)), "JPEG")}
    raw["json"] = b'{"label": 3, "caption": "a three"}'
    sample = ImageDecoder(image_size=8, num_labels=10)(raw, 0)
    assert (sample["label"], sample["caption"]) == (3, "a three")
    unlabelled = ImageDecoder(image_size=8)({"__key__": "k", "__url__": "u", "png": png()}, 0)
    assert "label" not in unlabelled
    assert unlabelled["caption"] is None


def test_flip_depends_on_seed_pass_and_key_alone():
    pixels = colours(8, 8)
    data = encoded(Image.fromarray(pixels))

    def flips(seed, number):
        decode = ImageDecoder(image_size=8, flip=True, seed=seed)
        flipped = []
        for key in range(64):
            image = decode({"__key__": str(key), "__url__": "u", "png": data}, number)["pixels"][:, 0]
            straight = to_tensor(Image.fromarray(pixels))[:, 0]
            mirrored = straight.flip(-1)
            assert torch.equal(image, straight) or torch.equal(image, mirrored)
            flipped.append(torch.equal(image, mirrored))
        return flipped

    assert flips(0, 0) == flips(0, 0)
    assert len({tuple(flips(seed, number)) for seed in (0, 1) for number in (0, 1)}) == 4
    assert 16 < sum(flips(0, 0)) < 48


def test_collate():
    def sample(key, caption, **more):
        return {"pixels": torch.zeros(3, 1, 4, 4, dtype=torch.uint8), "key": key, "caption": caption} | more

    batch = collate([sample("a", None, label=1), sample("b", "text", label=2)])
    assert batch["pixels"].shape == (2, 3, 1, 4, 4)
    assert batch["label"].dtype == torch.int64
    assert batch["label"].tolist() == [1, 2]
    assert (batch["key"], batch["caption"]) == (["a", "b"], ["", "text"])
    assert collate([sample("a", None)]).keys() == {"pixels", "key"}


def bomb(width, height):
    """A PNG of a few bytes whose header claims width x height pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"cls": b"1"}, Reason.NO_IMAGE),
        ({"png": b"", "cls": b"1"}, Reason.UNDECODABLE_IMAGE),
        ({"png": b"not a png at all", "cls": b"1"}, Reason.UNDECODABLE_IMAGE),
        ({"png": encoded(Image.fromarray(colours(8, 8)))[:-60], "cls": b"1"}, Reason.UNDECODABLE_IMAGE),
        ({"jpg": encoded(Image.fromarray(colours(8, 8)), "JPEG")[:-60], "cls": b"1"}, Reason.UNDECODABLE_IMAGE),
        ({"png": encoded(Image.fromarray(colours(8, 8)), "PCX"), "cls": b"1"}, Reason.UNDECODABLE_IMAGE),
        ({"png": bomb(9_000, 9_000), "cls": b"1"}, Reason.TOO_MANY_PIXELS),
        ({"png": bomb(60_000, 60_000), "cls": b"1"}, Reason.TOO_MANY_PIXELS),
        ({"png": bomb(8, 8), "cls": b"1"}, Reason.UNDECODABLE_IMAGE),
        ({"png": png(9), "cls": b"1"}, Reason.IMAGE_SIZE),
        ({"png": Reason.OVERSIZE_ENTRY, "cls": b"1"}, Reason.OVERSIZE_ENTRY),
        ({"png": png()}, Reason.NO_LABEL),
        ({"png": png(), "json": b"{}"}, Reason.NO_LABEL),
        ({"png": png(), "cls": b""}, Reason.BAD_LABEL),
        ({"png": png(), "cls": b"seven"}, Reason.BAD_LABEL),
        ({"png": png(), "cls": b"1.5"}, Reason.BAD_LABEL),
        ({"png": png(), "cls": b"9" * 5000}, Reason.BAD_LABEL),
        ({"png": png(), "json": b'{"label": "3"}'}, Reason.BAD_LABEL),
        ({"png": png(), "json": b'{"label": true}'}, Reason.BAD_LABEL),
        ({"png": png(), "cls": b"10"}, Reason.LABEL_OUT_OF_RANGE),
        ({"png": png(), "cls": b"-1"}, Reason.LABEL_OUT_OF_RANGE),
        ({"png": png(), "json": b"[1]"}, Reason.BAD_METADATA),
        ({"png": png(), "json": b"{"}, Reason.BAD_METADATA),
        ({"png": png(), "json": b"[" * 100_000}, Reason.BAD_METADATA),
        ({"png": png(), "cls": b"1", "txt": b"\xff\xfe\xfa"}, Reason.BAD_CAPTION),
        ({"png": png(), "json": b'{"label": 1, "caption": 5}'}, Reason.BAD_CAPTION),
        ({"png": png(), "json": b'{"label": 1, "caption": "\\ud800"}'}, Reason.BAD_CAPTION),
        ({"png": png(), "json": b'{"label": 1e400}'}, Reason.BAD_LABEL),
        ({"png": png(), "json": b'{"label": ' + b"9" * 5000 + b"}"}, Reason.BAD_METADATA),
    ],
    ids=lambda value: value.name if isinstance(value, Reason) else "",
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_hostile_samples(raw, expected):
    assert reason(raw) is expected


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""])
def test_captions_do_not_begin_with_a_mark_of_byte_order(mark):
    raw = {"txt": mark + b" a cat\n", "json": mark + b'{"caption": "\\ufeff a dog "}'}
    assert read_captions(raw, ["txt", "caption"]) == {"txt": "a cat", "caption": "a dog"}
    if mark:
        with pytest.raises(Skip, match="no caption"):
            read_captions({"txt": mark}, ["txt"])
