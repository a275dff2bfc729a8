"""Whatever bytes a sample has: every decoder gives a sample, or skips it for a reason of its own."""

import functools
import io
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from grn.data.captions import Captions
from grn.data.clips import ClipDecoder
from grn.data.samples import ImageDecoder
from grn.data.text_features import FeatureForm
from grn.data.text_images import TextImageDecoder
from grn.data.text_tokens import TextTokenDecoder
from grn.data.text_videos import TextVideoDecoder
from grn.data.tokens import TokenDecoder, write_array
from grn.media.skips import Reason, Skip

SIZES = ((1.0, ((1.0, (8, 8)),)),)
CAPTIONS = Captions((("txt", 1.0), ("caption", 1.0)), sentence_dropout=0.5, suffix=" {label}{caption}")
TEXT_IMAGES = TextImageDecoder(SIZES, CAPTIONS)
DECODERS = {
    "image": ImageDecoder(8, num_labels=10, center_crop=True, flip=True),
    "clip": ClipDecoder(8, frames=2, fps=(4.0, 8.0), num_labels=10),
    "captioned_image": TEXT_IMAGES,
    "captioned_video": TextVideoDecoder(TEXT_IMAGES, fps=Fraction(8), bucket=Fraction(1, 4), max_frames=9),
    "tokens": TokenDecoder(shape=(1, 3, 4), width=2, num_labels=10),
    "captioned_tokens": TextTokenDecoder(
        frozenset({(3, 4)}), latents=2, width=2, captions=CAPTIONS, features=FeatureForm(4, torch.float32, 8)
    ),
}
JSON = [
    b'{"label": 3, "caption": "a cat", "begin_frame_id": 1, "end_frame_id": 12, "fps": 24}',
    b'{"label": 1e400, "caption": "\\ud800", "begin_frame_id": -1, "fps": NaN}',
    b'{"label": [3], "caption": {}, "begin_frame_id": 1.5, "end_frame_id": "x", "fps": 0}',
    b'{"begin_frame_id": 5, "end_frame_id": 99999999999999999999, "fps": 1e-300}',
]


@pytest.fixture(scope="module")
def good(moving_digits, tmp_path_factory):
    """suffix -> contents that are right, to be damaged."""
    picture = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    pictures = {}
    for suffix, form in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")):
        picture.save(file := io.BytesIO(), form)
        pictures[suffix] = [file.getvalue()]
    (video,) = moving_digits(tmp_path_factory.mktemp("video"), 1).glob("*.mp4")
    features = save({"txt": torch.ones(2, 4), "caption": torch.ones(3, 4)})
    return pictures | {
        "mp4": [video.read_bytes()],
        "tokens.npy": [write_array(np.zeros((2, 1, 3, 4, 2), dtype=np.uint8))],
        "features.safetensors": [features],
        "cls": [b"3", b"-0", b"99", b"\xff"],
        "txt": [b"a cat", b"\xff\xfe", b"\0", b""],
        "json": JSON,
    }


@functools.cache
def samples(kinds):
    contents = [
        st.tuples(st.just(kind), st.integers(0, 3), st.integers(0, 2**20), st.binary(max_size=12)) for kind in kinds
    ]
    return st.lists(st.one_of(contents), min_size=1, max_size=6)


@pytest.mark.parametrize("name", DECODERS)
def test_damaged_samples_give_samples_or_reasons(name, good):
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
    @given(samples(tuple(good)), st.booleans())
    def check(drawn, whole):
        raw = {"__key__": "k", "__url__": "u"}
        for kind, which, place, damage in drawn:
            content = bytearray(good[kind][which % len(good[kind])])
            if not whole and content:
                place %= len(content)
                content[place : place + len(damage)] = damage
            raw[kind] = bytes(content)
        sample = reason = None
        try:
            sample = DECODERS[name](raw, 0)
        except Skip as skip:
            reason = skip.reason
        assert reason is not Reason.UNDECODABLE_SAMPLE
        if sample is not None:
            assert sample["key"] == "k"
            assert sample.get("caption") is None or sample["caption"].encode() is not None

    check()
