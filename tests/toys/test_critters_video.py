"""Critters in motion: frames show what captions and the json say, and new pairs are nowhere in training."""

import json
import random

import pytest
import torch

from grn.data.manifest import read_manifest
from grn.data.prepare.shards import shard_paths
from grn.data.stream.streaming import MAX_ENTRY_BYTES, read_shard
from grn.data.text_videos import TextVideoDataModule
from grn.media.video import probe_video
from grn.runtime.errors import UserError
from grn.toys.critters import Critter, read_caption
from grn.toys.critters_video import (
    CLOSED,
    FRAMES,
    MOTIONS,
    SHORT_WORDINGS,
    WORDINGS,
    CrittersVideoSource,
    frames,
    motion_caption,
    track,
)

SOME = Critter("orange", "bell", "two eyes", "a frown", "an antenna", "navy", accent="magenta")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("critters") / "video"
    assert CrittersVideoSource(size=32, samples=9, val=2, new=2, shard_size=5, num_workers=0).write(root)
    return root


def raws(root, split):
    urls = shard_paths(root, read_manifest(root), split)
    return [raw for url in urls for raw in read_shard(url, MAX_ENTRY_BYTES)]


def test_captions():
    told = "an orange bell critter with two eyes, a frown and an antenna on navy, hopping"
    assert motion_caption(SOME, "hopping") == told
    for motion in MOTIONS:
        for wording in (*WORDINGS, *SHORT_WORDINGS):
            caption = motion_caption(SOME, motion, wording)
            assert [it for it in MOTIONS if it in caption] == [motion]
            assert len(caption.encode()) < 128  # text_encoder.max_length of critters_t2v
            assert read_caption(caption)[0] == read_caption(told)[0]


def measured(motion):
    """(rows and columns of the critter's middle, its area, frames): of each frame."""
    clip = torch.stack(list(frames(SOME, track(motion, random.Random(0)), 48)))
    assert clip.shape == (FRAMES, 3, 48, 48)
    assert clip.dtype == torch.uint8
    shown = (clip.int() - torch.tensor([0x1D, 0x4E, 0xD8])[:, None, None]).abs().amax(dim=1) > 40
    area = shown.sum(dim=(1, 2)).double()
    places = torch.arange(48).double()
    rows, columns = (shown.sum(dim=axis).double() @ places / area for axis in (2, 1))
    return rows, columns, area, clip.int()


def test_clips_show_what_captions_say():
    rows, columns, area, _ = measured("hopping")
    assert rows.max() - rows.min() > 4
    assert abs(rows[0] - rows[-1]) < 0.5
    assert columns.max() - columns.min() < 0.5
    assert area.max() / area.min() < 1.1
    for motion, sign in (("moving left", -1), ("moving right", 1)):
        rows, columns, *_ = measured(motion)
        assert (columns[-1] - columns[0]) * sign > 12
        assert rows.max() - rows.min() < 0.5
    for motion, sign in (("growing", 1), ("shrinking", -1)):
        _, _, area, _ = measured(motion)
        assert ((area[1:] - area[:-1]) * sign > 0).all()
        assert (area[-1] / area[0]) ** sign > 3
    for motion, sign in (("turning left", -1), ("turning right", 1)):
        frame = measured(motion)[3][4]  # after a quarter of the turn, or a little less
        antenna = ((frame[0] > 150) & (frame[1] < 130) & (frame[2] > 100)).nonzero().double()
        assert (antenna[:, 1].mean() - 23.5) * sign > 8
    *_, pixels = measured("blinking")
    changed = (pixels - pixels[:1]).abs().amax(dim=1) > 60
    number = changed.sum(dim=(1, 2))
    assert (number > 0).sum() == 6
    assert number.max() < 150
    assert not changed[:, 30:].any()  # nothing but its eyes


def test_training_never_shows_new_pairs(root):
    every = []
    for split, number in (("train", 9), ("val", 2), ("new", 2)):
        own = raws(root, split)
        assert len(own) == number
        for raw in own:
            facts = json.loads(raw["json"])
            motion, steps = facts.pop("motion"), facts.pop("track")
            critter = Critter(**facts)
            assert critter.is_new == (split == "new")
            assert motion in raw["txt"].decode()
            assert len(steps) == FRAMES
            assert not (motion == "blinking" and critter.eyes == CLOSED)
            info = probe_video(raw["mp4"], "mp4")
            assert (info.width, info.height, info.codec, info.fps) == (32, 32, "h264", 16.0)
            every.append(critter)
    assert len(set(every)) == 13


def test_packs_are_made_of_them(root):
    data = TextVideoDataModule(
        name="critters_video", root=root, resolutions=[[32, 32]], max_frames=17, max_tokens=4096, batch_size=1
    )
    clips = [clip for batch in data.split_dataloader("val") for clip in batch["pixels"]]
    assert [tuple(clip.shape) for clip in clips] == [(3, 17, 32, 32)] * 2
    assert data.skipped() == {}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"samples": 0}, r"source\.samples=0 must"),
        ({"size": 33}, r"source\.size=33 must be even, in 16 to 512"),
        ({"new": 10**6}, "ask for fewer"),
    ],
)
def test_mistakes(tmp_path, arguments, expected):
    with pytest.raises(UserError, match=expected):
        CrittersVideoSource(**arguments).write(tmp_path / "x")
