"""What is said of shards none of whose samples can be used: what is in them, and which key of the config to set."""

import json

import pytest
from tars import write_tar
from test_image_files import encoded, smooth

from grn.data.images import ImageShardsDataModule
from grn.data.stream.streaming import ShardStream
from grn.data.stream.survey import survey, why_none
from grn.data.text_images import PackedTokens, TextImageDataModule
from grn.runtime.errors import UserError

JPEG = encoded(smooth(48, 32), "JPEG")
APPLE = b"\0\5\x16\7" * 40


def metadata(number):
    return json.dumps({"caption": f"picture {number}", "url": "http://x/y", "width": 48, "status": "success"}).encode()


def with_captions(name, number):
    return [(f"{name}.jpg", JPEG), (f"{name}.txt", b"a picture")]


SHARDS = {
    "dots": [e for i in range(8) for e in with_captions(f"photo_0.{i:03d}", i)],
    "inputs": [(f"{i}.{n}", d) for i in range(8) for n, d in (("input.jpg", JPEG), ("output.txt", b"x"))],
    "interleaved": [(f"{i}.jpg", JPEG) for i in range(8)] + [(f"{i}.txt", b"a picture") for i in range(8)],
    "other texts": [e for i in range(8) for e in ((f"{i}.jpg", JPEG), (f"{i}.json", b'{"prompt": "x", "alt": "y"}'))],
    "no captions": [(f"{i}.jpg", JPEG) for i in range(8)],
    "other names": [e for i in range(8) for e in ((f"image{i}.jpg", JPEG), (f"text{i}.txt", b"x"))],
    "raw photos": [e for i in range(8) for e in ((f"{i}.cr2", b"x"), (f"{i}.txt", b"x"))],
    "videos": [e for i in range(8) for e in ((f"{i}.mp4", b"x"), (f"{i}.txt", b"x"))],
    "tokens": [e for i in range(8) for e in ((f"{i}.tokens.npy", b"x"), (f"{i}.txt", b"x"))],
}
SAID = {
    "dots": "keys end at the first dot of a name, so that 'photo_0' has 000.jpg, 000.txt, 001.jpg, 001.txt and 12 "
    "more: name files with one dot",
    "inputs": "keys end at the first dot of a name, so that '0' has input.jpg, output.txt: name files with one dot",
    "interleaved": "the parts of a sample do not stand together: '0' has jpg in one place and txt in another: write "
    "the shards anew, sorted by name (tar --sort=name)",
    "other texts": "key.json has the texts prompt, alt: choose by ++data.captions={txt:0,prompt:1}",
    "no captions": "its samples have jpg (8)",
    "other names": "its samples have jpg (8), txt (8), each alone, the first is 'image0': parts of a sample need one "
    "name",
    "raw photos": "its samples have cr2 (8), txt (8)",
    "videos": "videos are read by data=video or data=captioned_video",
    "tokens": "tokens are read by data=tokens or data=captioned_tokens",
}


def text_images(train, val, **changes):
    data = TextImageDataModule(
        name="captioned_image", batch_size=1, resolutions=[[32, 48]], max_tokens=100, train=train, val=val,
        shuffle_buffer=4, lookahead=4, **changes,
    )  # fmt: skip
    data.packed_by(PackedTokens(8, 1, lambda captions: [[1] for _ in captions]))
    return data


@pytest.mark.parametrize("kind", SHARDS)
def test_training_says_what_was_found_and_which_key_to_set(tmp_path, kind):
    url = write_tar(tmp_path / "x.tar", SHARDS[kind])
    batches = iter(text_images(url, url).train_dataloader())
    with pytest.raises(UserError, match="have no usable sample") as told:
        next(batches)
    assert SAID[kind] in str(told.value)
    assert str(told.value).endswith(f"; the first shard is {url}")
    assert "\n" not in str(told.value)


def test_captions_of_json_alone_are_captions(tmp_path):
    """conf/data/captioned_image.yaml promises key.txt or key.json."""
    entries = [e for i in range(8) for e in ((f"{i}.jpg", JPEG), (f"{i}.json", metadata(i)))]
    url = write_tar(tmp_path / "x.tar", entries)
    data = text_images(url, url)
    found = {caption for batch in data.val_dataloader() for caption in batch["caption"]}
    assert found == {f"picture {i}" for i in range(8)}
    both = write_tar(tmp_path / "y.tar", [*entries[:2], ("0.txt", b"of the text file")])
    [batch] = text_images(both, both).val_dataloader()
    assert batch["caption"] == ["of the text file"]


def test_what_macs_add_is_passed_over(tmp_path):
    entries = [
        entry
        for i in range(8)
        for suffix, data in (("jpg", JPEG), ("txt", b"a picture"))
        for entry in ((f"train/._{i}.{suffix}", APPLE), (f"train/{i}.{suffix}", data))
    ]
    url = write_tar(tmp_path / "x.tar", entries)
    data = text_images(url, url)
    assert sum(len(batch["key"]) for batch in data.val_dataloader()) == 8
    assert data.skipped() == {}


def test_classes(tmp_path):
    url = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", JPEG) for i in range(4)])
    data = ImageShardsDataModule(name="x", batch_size=2, image_size=8, num_labels=10, train=url, val=url)
    with pytest.raises(
        UserError, match=r'labels are key\.cls, or "label" of key\.json; without labels, data\.num_labels'
    ):
        next(iter(data.train_dataloader()))
    data = ImageShardsDataModule(name="x", batch_size=2, image_size=8, train=url, val=url)
    with pytest.raises(UserError, match=r"image of another size: \d+.* cropped by data\.center_crop=true"):
        next(iter(data.train_dataloader()))


def test_the_first_warning_says_what_the_sample_has(tmp_path, caplog):
    url = write_tar(tmp_path / "x.tar", SHARDS["dots"])
    data = text_images(url, url)
    assert not list(data.val_dataloader())
    assert "sample 'photo_0' of" in caplog.text
    assert "no caption (it has 000.jpg, 000.txt, 001.jpg, 001.txt and 12 more)" in caplog.text


def test_nothing_is_said_of_what_cannot_be_read(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar" * 500)
    for url in (str(tmp_path / "x.tar"), str(tmp_path / "gone.tar"), write_tar(tmp_path / "empty.tar", [])):
        assert survey(url, [], key="data") == ""
        stream = ShardStream([url], lambda raw, _: raw)
        assert not list(stream)
        assert why_none(stream, "data").endswith(f"check the data.* keys and the shards; the first shard is {url}")


def test_hostile_names_and_metadata(tmp_path):
    names = ["a" * 300, "x\ny", "…\u202e", "[" * 50]
    entries = [
        e for n in names for e in ((f"{n}.jpg", JPEG), (f"{n}.json", b"[" * 60_000), (f"{n}.{'y' * 200}\n", b""))
    ]
    said = survey(write_tar(tmp_path / "x.tar", entries), ["no caption"], key="data")
    assert len(said) < 500
    assert said.isprintable()
