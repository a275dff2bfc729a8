"""Writing: plain webdataset shards, whole or not at all, the same bytes every time."""

import hashlib
import io
import json

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from grn.data.digits import LABEL_NAMES, DigitsSource, render
from grn.data.shards import read_manifest, shard_paths, write_shards
from grn.errors import UserError


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "digits"
    assert DigitsSource().write(root)
    return root


def read_plainly(root, split):
    urls = [str(path) for path in sorted(root.glob(f"{split}-*.tar"))]
    return list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))


def few(count=6):
    return [{"__key__": f"{i}", "png": b"x" * i, "cls": str(i), "txt": f"number {i}"} for i in range(count)]


def write(root, **changes):
    arguments = {
        "name": "few",
        "parameters": {"a": 1},
        "splits": {"train": few(), "heldout": few(3)},
        "num_shards": {"train": 2, "heldout": 1},
        "image_size": 8,
    }
    return write_shards(root, **(arguments | changes))


def test_digits_are_plain_webdataset_stratified_and_disjoint(digits):
    train, heldout = read_plainly(digits, "train"), read_plainly(digits, "heldout")
    assert (len(train), len(heldout)) == (1500, 297)
    assert len({sample["__key__"] for sample in train + heldout}) == 1797
    for samples in (train, heldout):
        counts = np.bincount([int(sample["cls"]) for sample in samples], minlength=10)
        whole = np.bincount([int(sample["cls"]) for sample in train + heldout], minlength=10)
        assert np.abs(counts - whole * len(samples) / 1797).max() < 1
    for sample in heldout:
        assert sample["txt"].decode() == f"a handwritten {LABEL_NAMES[int(sample['cls'])]}"
        image = Image.open(io.BytesIO(sample["png"]))
        assert (image.mode, image.size, image.format) == ("RGB", (32, 32), "PNG")
    assert len(list(digits.glob("train-*.tar"))) == 10
    assert len(list(digits.glob("heldout-*.tar"))) == 4


def test_digits_render_spans_the_range_and_keeps_the_picture():
    digit = np.zeros((8, 8))
    digit[2:6, 2:6] = 16
    image = np.asarray(Image.open(io.BytesIO(render(digit, 32))))
    assert image.shape == (32, 32, 3)
    assert (image[..., 0] == image[..., 2]).all()
    assert image[16, 16, 0] == 255
    assert image[0, 0, 0] == 0


def test_manifest_tells_what_lies_there(digits):
    manifest = read_manifest(digits)
    assert manifest["label_names"] == list(LABEL_NAMES)
    assert (manifest["num_labels"], manifest["image_size"]) == (10, 32)
    for split, samples in (("train", 1500), ("heldout", 297)):
        shards = manifest["splits"][split]["shards"]
        assert sum(shard["samples"] for shard in shards) == manifest["splits"][split]["samples"] == samples
        for shard in shards:
            data = (digits / shard["name"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        assert shard_paths(digits, manifest, split) == [str(digits / shard["name"]) for shard in shards]


def test_bytes_are_the_same_twice(digits, tmp_path):
    DigitsSource().write(tmp_path / "again")
    names = sorted(path.name for path in digits.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((digits / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_other_seed_splits_otherwise(digits, tmp_path):
    DigitsSource(seed=1).write(tmp_path / "other")
    keys = [{sample["__key__"] for sample in read_plainly(root, "heldout")} for root in (digits, tmp_path / "other")]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("keys", [{"heldout": 3}, {"heldout": 1797}, {"image_size": 0}, {"train_shards": 0}])
def test_digits_keys_out_of_range(tmp_path, keys):
    with pytest.raises(UserError, match="source"):
        DigitsSource(**keys).write(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_writing_again_does_nothing(tmp_path, caplog):
    caplog.set_level("INFO")
    assert write(tmp_path / "d")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()}
    assert not write(tmp_path / "d")
    assert "up to date" in caplog.text
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()}


def test_other_parameters_need_overwrite(tmp_path):
    root = tmp_path / "d"
    write(root)
    with pytest.raises(UserError, match=r"data\.root=.* a=1, not 2: .*overwrite=true"):
        write(root, parameters={"a": 2})
    assert read_manifest(root)["parameters"] == {"a": 1}
    assert write(root, parameters={"a": 2}, num_shards={"train": 1, "heldout": 1}, overwrite=True)
    assert read_manifest(root)["parameters"] == {"a": 2}
    assert sorted(path.name for path in root.iterdir()) == ["heldout-000000.tar", "manifest.json", "train-000000.tar"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_damaged_shards_are_told_and_mended_by_overwrite(tmp_path):
    root = tmp_path / "d"
    write(root)
    shard = root / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-000001\.tar has .*overwrite=true"):
        write(root)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar is missing.*overwrite=true"):
        write(root)
    assert write(root, overwrite=True)
    assert not write(root)


def test_a_crash_leaves_nothing(tmp_path):
    def failing():
        class Samples(list):
            def __getitem__(self, index):
                if isinstance(index, slice) and index.start == 1:
                    raise KeyboardInterrupt
                return super().__getitem__(index)

        return Samples(few())

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "d", splits={"train": failing(), "heldout": few(3)})
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "d")
    kept = (tmp_path / "d" / "manifest.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "d", splits={"train": failing(), "heldout": few(3)}, parameters={"a": 2}, overwrite=True)
    assert (tmp_path / "d" / "manifest.json").read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_failed_move_brings_the_old_data_back(tmp_path, monkeypatch):
    import os

    root = tmp_path / "d"
    write(root)
    replace = os.replace

    def failing(source, target):
        if source.name == "fresh":
            raise OSError("disk gone")
        replace(source, target)

    monkeypatch.setattr("grn.data.shards.os.replace", failing)
    with pytest.raises(OSError, match="disk gone"):
        write(root, parameters={"a": 2}, overwrite=True)
    assert read_manifest(root)["parameters"] == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_never_replaces_what_it_did_not_write(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("mine", "file"):
        with pytest.raises(UserError, match=r"data\.root="):
            write(tmp_path / name, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert write(tmp_path / "empty")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 1, "splits": {}}',
        '{"format": 99}',
        "\xff",
        '{"format": 1, "splits": {"train": {"samples": 1, "shards": [{"name": "../x.tar", "bytes": 1}]}}}',
        '{"format": 1, "splits": {"train": {"samples": 1, "shards": [{"name": "x.tar", "bytes": "1"}]}}}',
    ],
)
def test_hostile_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_manifest_is_json_with_a_format(tmp_path):
    write(tmp_path / "d")
    assert json.loads((tmp_path / "d" / "manifest.json").read_text())["format"] == 1
    assert read_manifest(tmp_path) is None
