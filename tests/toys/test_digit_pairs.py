"""Digits and pairs of them: what captions say is there, and held-out pairs are nowhere in training."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from grn.data.manifest import read_manifest
from grn.data.prepare.shards import shard_paths
from grn.data.stream.streaming import MAX_ENTRY_BYTES, read_shard
from grn.runtime.errors import UserError
from grn.toys.digit_pairs import HELDOUT_PAIRS, PAIRS, DigitPairsSource, pair_caption
from grn.toys.digits import digit_caption, render


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "t2i"
    assert DigitPairsSource(copies=2, val_copies=1).write(root)
    return root


def samples(root, split):
    urls = shard_paths(root, read_manifest(root), split)
    return [raw for url in urls for raw in read_shard(url, MAX_ENTRY_BYTES)]


def test_captions():
    assert digit_caption(7) == "a handwritten seven"
    assert pair_caption(3, 8) == "a three left of an eight"
    assert len(set(map(digit_caption, range(10))) | {pair_caption(*pair) for pair in PAIRS}) == 110


def test_training_never_shows_the_heldout_pairs(folder):
    train, val = (Counter(raw["txt"].decode() for raw in samples(folder, split)) for split in ("train", "val"))
    apart = {pair_caption(*pair) for pair in HELDOUT_PAIRS}
    assert len(apart) == 10
    assert not apart & set(train)
    assert {train[pair_caption(*pair)] for pair in PAIRS if pair not in HELDOUT_PAIRS} == {2}
    assert {val[pair_caption(*pair)] for pair in PAIRS} == {1}
    assert sum(train[digit_caption(label)] for label in range(10)) == 1500
    assert sum(val[digit_caption(label)] for label in range(10)) == 297
    assert {left for left, _ in HELDOUT_PAIRS} == {right for _, right in HELDOUT_PAIRS} == set(range(10))


def test_no_digit_of_the_val_split_is_in_training(folder):
    train, val = ({i for raw in samples(folder, s) for i in raw["__key__"].split("-")} for s in ("train", "val"))
    assert len(train | val) == 1797
    assert not train & val


def test_pictures_show_what_captions_say(folder, tmp_path):
    digits, labels = load_digits(return_X_y=True)
    for raw in samples(folder, "val")[:60]:
        numbers = [int(number) for number in raw["__key__"].split("-")]
        own = [int(labels[number]) for number in numbers]
        assert raw["txt"].decode() == (digit_caption(*own) if len(own) == 1 else pair_caption(*own))
        (tmp_path / "it.png").write_bytes(raw["png"])
        picture = np.asarray(Image.open(tmp_path / "it.png"))
        assert picture.shape == (32, 32 * len(own), 3)
        for place, number in enumerate(numbers):
            (tmp_path / "one.png").write_bytes(render(digits[number].reshape(8, 8), 32))
            assert np.array_equal(picture[:, 32 * place :][:, :32], np.asarray(Image.open(tmp_path / "one.png")))


@pytest.mark.parametrize(("name", "value"), [("copies", 0), ("size", 7), ("val", 5), ("train_shards", 0)])
def test_mistakes_name_the_key(tmp_path, name, value):
    with pytest.raises(UserError, match=rf"source\.{name}={value} must"):
        DigitPairsSource(**{name: value}).write(tmp_path / "x")
