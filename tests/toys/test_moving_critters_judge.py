"""The judge of critters in motion, on clips whose attributes are coded in plain squares."""

import random

import pytest
import torch

from grn.runtime.errors import UserError
from grn.toys.critters import ATTRIBUTES
from grn.toys.critters_video import MOTIONS, WORDINGS
from grn.toys.moving_critters_judge import MovingCrittersJudge

READ = ("color", "shape", "background", "motion")


def coded(number, seed):
    """Clips uint8 [N, 3, 17, 48, 48] with a stripe an attribute, at a place by its value; that of the motion brightens
    from frame to frame. And their captions."""
    draws, clips, captions = random.Random(seed), torch.zeros(number, 3, 17, 48, 48, dtype=torch.uint8), []
    for clip in clips:
        values = {name: draws.randrange(len(known)) for name, known in ATTRIBUTES.items()}
        motion = draws.randrange(len(MOTIONS))
        for place, name in enumerate(("color", "shape", "background")):
            clip[place, :, :40, 8 * values[name] : 8 * values[name] + 6] = 255
        for frame in range(17):
            clip[:, frame, 40:, 6 * motion : 6 * motion + 5] = 15 * frame
        told = {name: known[values[name]] for name, known in ATTRIBUTES.items()}
        captions.append(
            "{color} {shape}, {eyes}, {mouth}, {hat}, {background} background: ".format(**told) + MOTIONS[motion]
        )
    return clips, captions


def split_of(clips, captions):
    return lambda: iter([{"pixels": list(clips), "caption": captions, "key": captions}])


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    val = coded(40, 1)
    folder = tmp_path_factory.mktemp("judge")
    arguments = {"train": split_of(*coded(400, 0)), "val": split_of(*val), "prompts": val[1], "cache_dir": folder}
    judge = MovingCrittersJudge(**arguments)
    assert len(list(folder.glob("critters-judge-*.safetensors"))) == 1
    return judge, val


def test_captions_tell_what_can_be_read():
    told = MovingCrittersJudge.read("turning left: blue dome, one eye, a smile, an antenna, red background")
    assert told == [0, 0, -1, -1, -1, ATTRIBUTES["background"].index("red"), MOTIONS.index("turning left")]
    assert MovingCrittersJudge.read("a critter")[-1] == -1
    assert all("{motion}" in wording for wording in WORDINGS)


def test_real_clips_are_read_right(judge):
    judge, (clips, _) = judge
    judge.reset()
    judge.update(clips, torch.arange(len(clips)))
    scores = judge.compute()
    assert {f"{name}_accuracy" for name in (*READ, "attribute")} < set(scores)
    assert not [name for name in scores if name.endswith(("_seen", "_new")) or name.startswith(("eyes", "hat", "pair"))]
    assert scores["motion_accuracy"] > 0.8
    assert scores["judge_val_accuracy"] == pytest.approx(min(scores[f"{name}_accuracy"] for name in READ))
    assert scores["critters_fid"] == pytest.approx(scores["critters_fid_val"])


def test_clips_of_other_prompts_are_wrong(judge):
    judge, (clips, _) = judge
    judge.reset()
    judge.update(clips, torch.arange(len(clips)).roll(1))
    assert judge.compute()["motion_accuracy"] < 0.5


def test_mistakes(judge):
    with pytest.raises(UserError, match=r"no prompt tells of a critter"):
        MovingCrittersJudge.check(None, prompts=["a five falling"])
    with pytest.raises(UserError, match=r"reads uint8 \[B, 3, 17, 48, 48\], got torch.uint8 \[2, 3, 9, 48, 48\]"):
        judge[0].update(torch.zeros(2, 3, 9, 48, 48, dtype=torch.uint8), torch.arange(2))
