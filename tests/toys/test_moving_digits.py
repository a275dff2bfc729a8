"""Digits that move: files show what captions say, and held-out digits and pairs are nowhere in training."""

import re

import pytest
import torch
from sklearn.datasets import load_digits

from grn.data.manifest import read_manifest
from grn.data.prepare.shards import shard_paths
from grn.data.stream.streaming import MAX_ENTRY_BYTES, read_shard
from grn.data.text_videos import TextVideoDataModule
from grn.media.video import probe_video
from grn.runtime.errors import UserError
from grn.toys.digit_pairs import HELDOUT_PAIRS, PAIRS
from grn.toys.digits import LABEL_NAMES
from grn.toys.moving_digits import DIRECTIONS, MovingDigitsSource, crossing_caption, motion_caption


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Of a hundred digits, forty held out, so that the files are few."""
    root = tmp_path_factory.mktemp("digits") / "video"
    sizes = {"digits": 100, "val": 40, "train_shards": 2, "val_shards": 1}
    assert MovingDigitsSource(copies=1, val_copies=0, **sizes).write(root)
    return root


def raws(root, split):
    urls = shard_paths(root, read_manifest(root), split)
    return [raw for url in urls for raw in read_shard(url, MAX_ENTRY_BYTES)]


def test_captions():
    assert motion_caption(5, "falling") == "a five falling"
    assert crossing_caption(3, 8) == "a three crossing over an eight"


def test_training_shows_no_val_digit_and_no_val_pair(root):
    train, val = (raws(root, split) for split in ("train", "val"))
    shown, apart = (
        {int(number) for raw in part for number in re.findall(r"(?:^|-)(\d{4})\+", raw["__key__"])}
        for part in (train, val)
    )
    assert (len(shown), len(apart)) == (60, 40)
    assert not shown & apart
    captions = [raw["txt"].decode() for raw in train]
    assert {crossing_caption(*pair) for pair in PAIRS if pair not in HELDOUT_PAIRS} < set(captions)
    assert not {crossing_caption(*pair) for pair in HELDOUT_PAIRS} & set(captions)
    assert {motion_caption(label, way) for label in range(10) for way in DIRECTIONS} < set(captions)


def test_files_are_h264_of_17_frames(root):
    for raw in raws(root, "val")[:3]:
        info = probe_video(raw["mp4"], "mp4")
        assert (info.width, info.height, info.codec, info.fps) == (32, 32, "h264", 16.0)
        assert info.duration_s == pytest.approx(17 / 16)


def test_clips_show_what_captions_say(root):
    data = TextVideoDataModule(
        name="digits_video", root=root, resolutions=[[32, 32]], max_frames=17, max_tokens=4096, batch_size=1
    )
    labels = load_digits(return_X_y=True)[1]
    seen = set()
    for batch in data.split_dataloader("train"):
        for pixels, caption, key in zip(batch["pixels"], batch["caption"], batch["key"]):
            assert pixels.shape == (3, 17, 32, 32)
            own = [labels[int(part.split("+")[0])] for part in key.split("-")]
            if len(own) == 2:
                assert caption == crossing_caption(*own)
                ways = [moved(half) for half in pixels.chunk(2, dim=2)]
                assert {ways[0], ways[1]} == {"moving left", "moving right"}
            else:
                assert caption == f"{'an' if own[0] == 8 else 'a'} {LABEL_NAMES[own[0]]} {moved(pixels)}"
            seen.add(caption)
    assert len(seen) == 40 + 90
    assert data.skipped() == {}


def moved(pixels):
    """The direction in which the light of uint8 [3, T, H, W] goes."""
    light = pixels.double().mean(dim=0)
    steps = []
    for axis in (1, 2):
        places = torch.arange(light.shape[axis]).double()
        centre = (light.sum(dim=3 - axis) * places).sum(dim=1) / light.sum(dim=(1, 2))
        steps.append(float(centre[-1] - centre[0]))
    rows, columns = steps
    assert max(abs(rows), abs(columns)) > 8
    assert min(abs(rows), abs(columns)) < 1
    if abs(rows) > abs(columns):
        return "falling" if rows > 0 else "rising"
    return "moving right" if columns > 0 else "moving left"


@pytest.mark.parametrize(("name", "value"), [("copies", -1), ("digits", 99), ("val", 5), ("train_shards", 0)])
def test_mistakes_name_the_key(tmp_path, name, value):
    with pytest.raises(UserError, match=rf"source\.{name}={value} must"):
        MovingDigitsSource(**{name: value}).write(tmp_path / "x")
