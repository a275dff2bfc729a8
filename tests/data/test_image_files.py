"""Image files of every kind that Pillow reads: colours by profiles, JPEGs without their end, transparency."""

import io
import logging

import numpy as np
import pytest
from PIL import Image, ImageCms
from tars import write_tar

from grn.data.samples import ImageDecoder
from grn.data.stream.streaming import MAX_ENTRY_BYTES, ShardStream, report_skipped
from grn.media.colour import MAX_PROFILE_BYTES
from grn.media.images import IMAGE_FORMATS, IMAGE_SUFFIXES, decode_image, open_image, to_rgb
from grn.media.skips import Note, Reason, Skip, noting


def encoded(image, format="PNG", **options):
    data = io.BytesIO()
    image.save(data, format=format, **options)
    return data.getvalue()


def smooth(width=75, height=53):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def notes_on(data):
    with noting() as notes:
        image = decode_image(data)
    return np.asarray(image), notes


LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}, "PPM": {}, "QOI": {}, "GIF": {}}


@pytest.mark.parametrize("format", LOSSLESS)
def test_lossless_formats(format):
    image = smooth().quantize(200).convert("RGB")  # as many colours as GIF has
    pixels, notes = notes_on(encoded(image, format, **LOSSLESS[format]))
    assert (pixels == np.asarray(image)).all()
    assert notes == []


@pytest.mark.parametrize("format", ["JPEG", "AVIF", "JPEG2000"])
def test_lossy_formats(format):
    if format not in IMAGE_FORMATS:
        pytest.skip("not in this build of Pillow")
    pixels, _ = notes_on(encoded(smooth(), format, quality=95) if format != "JPEG2000" else encoded(smooth(), format))
    assert np.abs(pixels.astype(int) - np.asarray(smooth())).mean() < 4


def test_suffixes():
    assert IMAGE_SUFFIXES[:4] == ("png", "jpg", "jpeg", "webp")
    assert {"gif", "bmp", "tif", "tiff", "jfif", "jpe", "jp2", "ppm", "qoi", "apng"} <= set(IMAGE_SUFFIXES)
    assert ("avif" in IMAGE_SUFFIXES) == ("AVIF" in IMAGE_FORMATS)
    assert not {"eps", "ps", "psd", "wmf", "ico", "h5", "mpg", "mpeg", "svg"} & set(IMAGE_SUFFIXES)
    assert {MAX_ENTRY_BYTES[suffix] for suffix in IMAGE_SUFFIXES} == {64 * 2**20}


@pytest.mark.parametrize("format", ["ICO", "PCX", "TGA", "EPS", "SGI"])
def test_other_formats_are_not_opened(format):
    with pytest.raises(Skip, match="cannot be decoded"):
        decode_image(encoded(Image.new("RGB", (16, 16)), format))


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime", "blue")]
    for format in {"GIF", "PNG", "WEBP", "TIFF", "AVIF"} & set(IMAGE_FORMATS):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.abs(notes_on(data)[0].astype(int) - [255, 0, 0]).max() < 8, format


def test_tiff_of_many_kinds():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert notes_on(encoded(Image.fromarray(values), "TIFF"))[0][0, :, 0].tolist() == [0, 1, 128, 255]
    for odd in (np.float32([[0.5]]), np.int32([[7]])):
        with pytest.raises(Skip) as caught:
            decode_image(encoded(Image.fromarray(odd), "TIFF"))
        assert caught.value.reason is Reason.UNKNOWN_RANGE
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert notes_on(encoded(cmyk, "TIFF"))[0][0, 0].tolist() == [255, 0, 0]
    black = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    assert notes_on(encoded(black, "TIFF"))[0].min() == 255
    assert notes_on(encoded(black, "GIF"))[0].min() == 255


def test_transparency_is_kept_until_a_background_is_chosen():
    layer = Image.new("RGBA", (3, 1), (255, 255, 255, 255))
    layer.putpixel((1, 0), (255, 255, 255, 0))
    layer.putpixel((2, 0), (255, 255, 255, 100))
    for image in (layer, layer.convert("LA")):
        kept = open_image(encoded(image))
        assert np.asarray(kept)[0, :, 3].tolist() == [255, 0, 100]
        assert np.asarray(to_rgb(kept, background="black"))[0, :, 0].tolist() == [255, 0, 100]
        assert np.asarray(to_rgb(kept)).min() == 255


# What colour management says of a colour: computed by hand from the primaries and the transfer curve.
D65 = {"x": 0.3127, "y": 0.3290}
ADOBE = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
SRGB = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)


def to_xyz(primaries):
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in zip(primaries[::2], primaries[1::2])]).T
    white = np.array([D65["x"] / D65["y"], 1, (1 - D65["x"] - D65["y"]) / D65["y"]])
    return columns * np.linalg.solve(columns, white)


def adobe_to_srgb(colour):
    linear = (np.array(colour) / 255) ** (563 / 256)
    linear = np.clip(np.linalg.inv(to_xyz(SRGB)) @ to_xyz(ADOBE) @ linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def matrix_profile(primaries, gamma):
    """A profile of RGB with D65 white, written by hand (ICC v2: primaries adapted to D50, and curves)."""
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d65, d50 = to_xyz(primaries).sum(axis=1), np.array([0.9642, 1, 0.8249])
    adapt = np.linalg.inv(bradford) @ np.diag((bradford @ d50) / (bradford @ d65)) @ bradford
    columns = (adapt @ to_xyz(primaries)).T

    def fixed(value):
        return round(value * 65536).to_bytes(4, "big", signed=True)

    tags = {
        name: b"XYZ " + bytes(4) + b"".join(map(fixed, xyz)) for name, xyz in zip(("rXYZ", "gXYZ", "bXYZ"), columns)
    }
    tags["wtpt"] = b"XYZ " + bytes(4) + b"".join(map(fixed, d50))
    curve = b"curv" + bytes(4) + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big") + bytes(2)
    tags |= dict.fromkeys(("rTRC", "gTRC", "bTRC"), curve)
    tags["desc"] = b"desc" + bytes(4) + (2).to_bytes(4, "big") + b"x\0" + bytes(78)
    place, table, body = 128 + 4 + 12 * len(tags), len(tags).to_bytes(4, "big"), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name.encode() + (place + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data
    size = (place + len(body)).to_bytes(4, "big")
    header = size + bytes(4) + b"\x02\x10\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28) + b"".join(map(fixed, d50))
    return header + bytes(128 - len(header)) + table + body


COLOURS = [(255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 100, 50), (100, 180, 120), (60, 90, 200)]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_colours_are_as_the_profile_says(format):
    if format not in IMAGE_FORMATS:
        pytest.skip("not in this build of Pillow")
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100}}
    image = Image.new("RGB", (16 * len(COLOURS), 16))
    for place, colour in enumerate(COLOURS):
        image.paste(colour, (16 * place, 0, 16 * place + 16, 16))
    profile = matrix_profile(ADOBE, 563 / 256)
    pixels, notes = notes_on(encoded(image, format, icc_profile=profile, **options.get(format, {})))
    assert notes == []
    expected = np.array([adobe_to_srgb(colour) for colour in COLOURS])
    assert np.abs(pixels[8, 8::16].astype(int) - expected).max() < (3 if format in ("PNG", "TIFF", "WEBP") else 6)
    assert np.abs(expected - COLOURS).max() > 15  # so that it matters


def test_profiles_of_transparent_grey_and_paletted_pictures():
    profile = matrix_profile(ADOBE, 563 / 256)
    expected = np.array(adobe_to_srgb((200, 100, 50)))
    image = Image.new("RGBA", (8, 8), (200, 100, 50, 255))
    image.putpixel((0, 0), (200, 100, 50, 0))
    pixels, notes = notes_on(encoded(image, icc_profile=profile))
    assert np.abs(pixels[4, 4] - expected).max() < 3
    assert pixels[0, 0].tolist() == [255, 255, 255]
    paletted = image.convert("RGB").quantize(4)
    assert np.abs(notes_on(encoded(paletted, icc_profile=profile))[0][4, 4] - expected).max() < 3
    grey, more = notes_on(encoded(Image.new("L", (8, 8), 128), icc_profile=profile))
    assert np.abs(grey[0, 0] - adobe_to_srgb((128,) * 3)).max() < 3
    assert notes == more == []


def test_the_profile_of_srgb_changes_nothing():
    data = encoded(smooth(), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    pixels, notes = notes_on(data)
    assert (pixels == np.asarray(smooth())).all()
    assert notes == []


@pytest.mark.parametrize(
    "profile",
    [b"x", bytes(100_000), matrix_profile(ADOBE, 2.2)[:300], bytes(MAX_PROFILE_BYTES + 1)],
    ids=["junk", "zeros", "cut", "large"],
)
def test_profiles_that_cannot_be_used_are_noted(profile):
    pixels, notes = notes_on(encoded(smooth(), "TIFF", icc_profile=profile))
    assert (pixels == np.asarray(smooth())).all()
    assert notes == [Note.BAD_PROFILE]
    cmyk = encoded(Image.new("CMYK", (8, 8)), "JPEG", icc_profile=matrix_profile(ADOBE, 2.2))
    assert notes_on(cmyk)[1] == [Note.BAD_PROFILE]


JPEGS = {
    "baseline": {},
    "not subsampled": {"quality": 100, "subsampling": 0},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "grey": {},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_may_lack_its_end_marker_and_nothing_more(kind):
    image = smooth().convert("L") if kind == "grey" else smooth()
    data = encoded(image, "JPEG", **JPEGS[kind])
    whole, _ = notes_on(data)
    for missing in (1, 2):
        pixels, notes = notes_on(data[:-missing])
        assert (pixels == whole).all()
        assert notes == [Note.NO_END_MARKER]
    assert (notes_on(data[:-2] + bytes(500))[0] == whole).all()
    # Fewer in "restarts", where a marker stands between parts of the picture; in "progressive", scans end early.
    cuts = [*range(3, 40), *range(40, len(data) - 3, 23)]
    scans = [place for place in range(3, len(data) - 3) if data[place : place + 2] in (b"\xff\xda", b"\xff\xc4")]
    for cut in [len(data) - missing for missing in cuts] + scans + [place + 1 for place in scans]:
        with pytest.raises(Skip) as caught:
            decode_image(data[:cut])
        assert caught.value.reason is Reason.UNDECODABLE_IMAGE, len(data) - cut


def test_the_stream_counts_what_it_reads_all_the_same(tmp_path, caplog):
    jpeg = encoded(Image.new("RGB", (8, 8), "red"), "JPEG")
    odd = encoded(Image.new("RGB", (8, 8)), icc_profile=b"x")
    entries = [(f"{i}.jpg", jpeg[:-2] if i < 3 else jpeg) for i in range(5)] + [("5.png", odd), ("6.png", b"")]
    stream = ShardStream([write_tar(tmp_path / "x.tar", entries)], ImageDecoder(image_size=8))
    caplog.set_level(logging.WARNING)
    assert [sample["key"] for sample in stream] == ["0", "1", "2", "3", "4", "5"]
    assert stream.noted() == {"JPEG without its end marker": 3, "color profile that cannot be used": 1}
    assert stream.skipped() == {"image cannot be decoded": 1}
    assert "using sample '0' of" in caplog.text
    caplog.clear()
    report_skipped(stream.skipped(), stream.noted())
    assert [record.getMessage() for record in caplog.records] == [
        "skipped samples: 1 x image cannot be decoded",
        "samples used all the same: 3 x JPEG without its end marker, 1 x color profile that cannot be used",
    ]
