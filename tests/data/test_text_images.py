"""Captioned images: shards of others, hostile captions, the size nearest to a shape, packs of what a trainer feeds."""

import io
import json
import math

import pytest
import torch
from PIL import Image
from tars import write_tar

from grn.data.text_images import PackedTokens, TextImageDataModule
from grn.media.skips import Reason
from grn.method.resolutions import TEMPLATES, resolution
from grn.networks.text_encoder import ByteT5
from grn.runtime.errors import UserError

CAPTION = "a dog runs over a field"


def encoded(size, kind="JPEG", mode="RGB", color=None):
    data = io.BytesIO()
    Image.new(mode, size, color or (0 if mode == "L" else (200, 30, 60, 128)[: len(mode)])).save(data, kind)
    return data.getvalue()


def make(shard, **arguments):
    sizes = {} if "resolutions" in arguments else {"pixels": "0.06M"}
    defaults = {"name": "captioned_image", "max_tokens": 2048, "batch_size": 1, "lookahead": 8, "caption_dropout": 0.0}
    module = TextImageDataModule(**(defaults | sizes | {"train": shard, "val": shard} | arguments))
    module.packed_by(PackedTokens(16, 4, lambda captions: [[*c.encode()[:64], 1] for c in captions]))
    return module


def held_out(module):
    return {
        key: (caption, tuple(pixels.shape))
        for batch in module.val_dataloader()
        for key, caption, pixels in zip(batch["key"], batch["caption"], batch["pixels"])
    }


@pytest.fixture(scope="module")
def cc12m(tmp_path_factory):
    """As img2dataset writes CC12M: jpg, json and txt of a sample, in whatever order; nine images of all shapes."""
    samples = []
    for number in range(9):
        key = f"{number:09d}"
        size = (300 + 60 * number, 620 - 40 * number)
        metadata = {"caption": CAPTION, "url": "http://x/y.jpg", "width": size[0], "exif": "{}", "sha256": "0" * 64}
        samples += [
            (f"{key}.jpg", encoded(size)),
            (f"{key}.json", json.dumps(metadata | {"key": key, "long": f"{CAPTION}, number {number}"}).encode()),
            (f"{key}.txt", CAPTION.encode()),
        ]
    return write_tar(tmp_path_factory.mktemp("cc12m") / "00000.tar", samples)


@pytest.mark.parametrize("prefix", ["", "file://", "pipe:cat "])
def test_cc12m_streams_unchanged(cc12m, prefix):
    module = make(prefix + cc12m)
    found = held_out(module)
    assert list(found) == [f"{number:09d}" for number in range(9)]
    assert {caption for caption, _ in found.values()} == {CAPTION}
    allowed = {(3, 1, *resolution(template, "0.06M")) for template in TEMPLATES}
    shapes = {shape for _, shape in found.values()}
    assert shapes <= allowed
    assert len(shapes) > 3
    assert module.skipped() == {}


def test_every_image_goes_to_the_nearest_shape(cc12m):
    for number, (_, shape) in enumerate(held_out(make(cc12m)).values()):
        ratio = (620 - 40 * number) / (300 + 60 * number)
        nearest = min(TEMPLATES, key=lambda template: abs(template - ratio))
        assert shape[2:] == resolution(nearest, "0.06M")
    own = make(cc12m, resolutions=[[32, 32], [32, 64]])
    assert {shape[2:] for _, shape in held_out(own).values()} == {(32, 32), (32, 64)}


def test_captions_are_drawn_by_weight_among_those_that_are_there(cc12m):
    captions = {"txt": 1.0, "long": 3.0, "not there": 100.0}
    module = make(cc12m, captions=captions)
    decode = module.decoder(training=True)
    raws = list(module._stream("val").shard(cc12m))
    drawn = [decode(raw, number)["caption"] for raw in raws for number in range(40)]
    share = sum("number" in caption for caption in drawn) / len(drawn)
    assert 0.65 < share < 0.85
    assert drawn == [decode(raw, number)["caption"] for raw in raws for number in range(40)]


def test_captions_are_dropped_in_training_alone(cc12m):
    module = make(cc12m, caption_dropout=0.5)
    raws = list(module._stream("val").shard(cc12m))
    drawn = [module.decoder(training=True)(raw, number)["caption"] for raw in raws for number in range(40)]
    assert 0.4 < drawn.count("") / len(drawn) < 0.6
    assert set(drawn) == {"", CAPTION}
    assert {caption for caption, _ in held_out(module).values()} == {CAPTION}


def test_captions_are_worded_and_lose_sentences_in_training_alone(tmp_path):
    long = "A dog runs. It is brown! Is it? 3.5 m long"
    samples = [("a.jpg", encoded((64, 64))), ("a.txt", long.encode())]
    samples += [("a.json", json.dumps({"quality_prompt": " sharp. ", "number": 3}).encode())]
    samples += [("b.jpg", encoded((64, 64))), ("b.txt", b"b")]
    shard = write_tar(tmp_path / "0.tar", samples)
    worded = {"caption_prefix": "<T2V>", "caption_suffix": " {quality_prompt} {number}"}
    module = make(shard, **worded, sentence_dropout=0.5, caption_dropout=0.2)
    assert {key: it for key, (it, _) in held_out(module).items()} == {"a": f"<T2V>{long} sharp.", "b": "<T2V>b"}
    raw = next(iter(module._stream("val").shard(shard)))
    drawn = [module.decoder(training=True)(raw, number)["caption"] for number in range(400)]
    parts = ["A dog runs.", "A dog runs. It is brown!", "A dog runs. It is brown! Is it?", long]
    assert set(drawn) == {"", *(f"<T2V>{part} sharp." for part in parts)}
    assert 0.1 < drawn.count("") / 400 < 0.3
    assert 0.04 < drawn.count("<T2V>A dog runs. sharp.") / 400 < 0.16  # 0.8 * 0.5 / 4


def test_sizes_that_a_source_hardly_has_are_not_drawn(tmp_path):
    shard = write_tar(tmp_path / "0.tar", [("a.jpg", encoded((450, 450))), ("a.txt", b"a")])
    raw = next(iter(make(shard)._stream("val").shard(shard)))

    def drawn(**changes):
        decode = make(shard, pixels={"0.06M": 1, "0.25M": 1, "1M": 1}, max_tokens=8192, **changes).decoder(
            training=True
        )
        return {decode(raw, number)["pixels"].shape[-1] for number in range(40)}

    assert drawn() == {256, 512, 1024}
    assert drawn(source_share=0.7) == {256, 512}  # 450^2 / 0.7 = 538^2
    assert drawn(source_share=1) == {256}
    assert drawn(source_share=100) == {256}


def test_hostile_samples_are_handled_or_counted(tmp_path):
    picture = encoded((64, 64))
    usable = {
        "long": "word " * 2000,
        "scripts": "狗在跑 собака бежит كلب يجري 🐕‍🦺",
        "nul": "a\x00b\u202e",
    }
    samples = [("ok.jpg", picture), ("ok.txt", b" a dog ")]
    for key, caption in usable.items():
        samples += [(f"{key}.jpg", picture), (f"{key}.txt", caption.encode())]
    samples += [("alpha.webp", encoded((64, 64), "WEBP", "RGBA")), ("alpha.txt", b"half there")]
    samples += [("grey.png", encoded((64, 64), "PNG", "L")), ("grey.txt", b"grey")]
    for key, caption in {"empty": b"", "blank": b" \n ", "latin": b"caf\xe9", "huge": b"x" * 2**21}.items():
        samples += [(f"{key}.jpg", picture), (f"{key}.txt", caption)]
    samples += [("alone.jpg", picture), ("keyless.jpg", picture), ("keyless.json", b'{"alt": "a dog"}')]
    samples += [("number.jpg", picture), ("number.json", b'{"caption": 3}')]
    samples += [("broken.jpg", picture), ("broken.json", b"{" * 50000)]
    samples += [("narrow.jpg", encoded((640, 40))), ("narrow.txt", b"narrow")]
    samples += [("tiny.jpg", encoded((8, 8))), ("tiny.txt", b"tiny")]
    samples += [("pictureless.txt", b"nothing"), ("torn.jpg", picture[:99]), ("torn.txt", b"torn")]
    shard = write_tar(tmp_path / "s.tar", samples)
    module = make(shard, captions={"txt": 1, "caption": 1}, min_size=16, max_aspect=4)
    found = held_out(module)
    assert set(found) == {"ok", "alpha", "grey", *usable}
    assert found["ok"][0] == "a dog"
    assert found["scripts"][0] == usable["scripts"]
    expected = {
        Reason.NO_CAPTION: 4,  # empty, blank, alone, keyless
        Reason.BAD_CAPTION: 2,  # latin, number
        Reason.OVERSIZE_ENTRY: 1,
        Reason.BAD_METADATA: 1,
        Reason.TOO_NARROW: 1,
        Reason.TOO_SMALL: 1,
        Reason.NO_IMAGE: 1,
        Reason.UNDECODABLE_IMAGE: 1,
    }
    assert module.skipped() == {reason.value: count for reason, count in expected.items()}


def test_packs_of_mixed_resolutions_are_full(cc12m):
    module = make(cc12m, pixels={"0.06M": 2, "0.25M": 1}, max_tokens=8192, lookahead=32)
    batches = iter(module.train_dataloader())
    filled = []
    for _ in range(6):
        batch = next(batches)
        visual = [pixels[0, 0].numel() // 256 for pixels in batch["pixels"]]
        text = [min(64, len(caption.encode())) + 1 for caption in batch["caption"]]
        assert batch["tokens"] == sum(visual) + sum(text) + len(text) <= batch["max_tokens"] == 8192
        assert batch["packs"] == [len(batch["key"])]
        assert len(set(visual)) > 2
        filled.append(batch["tokens"] / batch["max_tokens"])
    assert sum(filled) / len(filled) >= 0.95


def test_resumed_packs_are_the_same_bits(cc12m):
    def loader():
        return make(cc12m, caption_dropout=0.3, max_tokens=4096, flip=True).train_dataloader()

    whole = loader()
    batches = [batch for _, batch in zip(range(7), whole)]
    first = loader()
    _ = [batch for _, batch in zip(range(3), first)]
    second = loader()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for expected, found in zip(batches[3:], second):
        assert found["key"] == expected["key"]
        assert found["caption"] == expected["caption"]
        assert all(map(torch.equal, found["pixels"], expected["pixels"]))
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"pixels": "3M"}, r"data\.pixels=3M is not one of"),
        ({"pixels": None}, r"give one of data\.pixels=None and data\.resolutions=None"),
        ({"pixels": {"1M": 0}}, r"data\.pixels=.* one of them positive"),
        ({"resolutions": [[32]]}, r"data\.resolutions=.* pairs"),
        ({"resolutions": [[40, 40]]}, r"40x40 pixels are not multiples of the tokenizer's stride 16"),
        ({"pixels": "1M"}, r"data\.max_tokens=2048 holds no image of"),
        ({"captions": {}}, r"data\.captions"),
        ({"caption_dropout": 1.5}, r"data\.caption_dropout=1\.5"),
        ({"max_aspect": 0.5}, r"data\.max_aspect=0\.5"),
        ({"lookahead": 0}, r"data\.lookahead=0"),
        ({"lookahead": 1.5}, r"data\.lookahead=1\.5 must be a whole number"),
        ({"max_tokens": None}, r"^data\.max_tokens=None must be a whole number, at least 1$"),
        ({"min_size": None}, r"^data\.min_size=None must be a whole number"),
        ({"max_aspect": "a"}, r"^data\.max_aspect=a must be a number of at least 1$"),
        ({"caption_dropout": "x"}, r"^data\.caption_dropout=x must be a number in 0 to 1$"),
        ({"captions": {"txt": "abc"}}, r"^data\.captions\.txt=abc must be a number"),
        ({"captions": {"txt": math.nan}}, r"^data\.captions\.txt=nan must be a number"),
        ({"sentence_dropout": 2}, r"^data\.sentence_dropout=2 must be a number in 0 to 1$"),
        ({"max_share": "x"}, r"^data\.max_share=x must be a number in 0 to 1$"),
        ({"source_share": 0}, r"^data\.source_share=0 must be a number in 0\.01 to 100$"),
        ({"caption_prefix": 3}, r"^data\.caption_prefix=3 must be a text"),
        ({"captions": ["txt"]}, r"^data\.captions=.*\{NAME:1,OTHER:2\}"),
        ({"captions": None}, r"^data\.captions=None"),
        ({"pixels": {"0.25M": "x"}}, r"^data\.pixels\.0\.25M=x must be a number"),
        ({"pixels": 1}, r"^data\.pixels=1 must say"),
        ({"resolutions": [32, 64]}, r"^data\.resolutions=.*pairs"),
        ({"resolutions": [[32, "x"]]}, r"^data\.resolutions=.*pairs"),
        ({"resolutions": 32}, r"^data\.resolutions=32 must be pairs"),
        ({"batch_size": None}, r"^data\.batch_size=None must be a whole number"),
        ({"num_workers": "x"}, r"^data\.num_workers=x must be a whole number, at least 0"),
    ],
)
def test_mistakes_are_explained(cc12m, arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        make(cc12m, **arguments)


def test_cut_captions_are_counted(cc12m):
    """Of every image once in each pass: the caption has more bytes than the encoder takes."""
    module = make(cc12m, captions={"txt": 1.0})
    encoder = ByteT5(width=8, depth=1, heads=1, hidden=8, max_length=len(CAPTION.encode()))
    module.packed_by(PackedTokens(16, 4, encoder.tokenization))
    next(iter(module.train_dataloader()))
    ((note, count),) = module.noted().items()
    assert note == "caption cut, longer than text_encoder.max_length"
    assert count >= 1
    encoder = ByteT5(width=8, depth=1, heads=1, hidden=8, max_length=len(CAPTION.encode()) + 1)
    module.packed_by(PackedTokens(16, 4, encoder.tokenization))
    next(iter(module.train_dataloader()))
    assert module.noted() == {}
