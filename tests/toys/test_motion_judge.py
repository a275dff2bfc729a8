"""The judge of moving digits reads real clips, and tells another digit, another way and a halt from what was asked."""

import pytest
import torch

from grn.data.text_videos import TextVideoDataModule
from grn.runtime.errors import UserError
from grn.toys.motion_judge import ASKED, MovingDigitsJudge, around_centroid, motion
from grn.toys.moving_digits import MovingDigitsSource

pytestmark = pytest.mark.full  # for its data and its training

PROMPTS = [*ASKED, "a cat"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "video"
    sizes = {"digits": 300, "val": 30, "train_shards": 1, "val_shards": 1}
    MovingDigitsSource(copies=0, val_copies=1, **sizes).write(root)
    arguments = {"resolutions": [[32, 32]], "max_frames": 17, "max_tokens": 4096, "batch_size": 1}
    return TextVideoDataModule(name="digits_video", root=root, eval_batch_size=100, **arguments)


@pytest.fixture(scope="module")
def judge(data):
    splits = {name: lambda name=name: data.split_dataloader(name) for name in ("train", "val")}
    return MovingDigitsJudge(prompts=PROMPTS, **splits)


@pytest.fixture(scope="module")
def clips(data):
    """(uint8 [220, 3, 17, 32, 32], numbers of their prompts), of held-out digits."""
    batches = list(data.split_dataloader("val"))
    captions = [PROMPTS.index(caption) for batch in batches for caption in batch["caption"]]
    return torch.stack([clip for batch in batches for clip in batch["pixels"]]), torch.tensor(captions)


def scores(judge, clips, labels):
    judge.reset()
    judge.update(clips, labels)
    return judge.compute()


def test_it_reads_real_clips(judge, clips):
    found = scores(judge, *clips)
    assert found["motion_accuracy"] == found["crossing_motion_accuracy"] == 1.0
    assert found["frame_accuracy"] > 0.9
    assert found["clip_accuracy"] > 0.9
    assert found["judge_val_accuracy"] > 0.9


def test_what_was_not_asked_for_is_wrong(judge, clips):
    pixels, labels = clips
    assert scores(judge, pixels.flip(2)[labels < 40], labels[labels < 40])["motion_accuracy"] == 0  # backwards
    assert scores(judge, pixels[:, :, :1].expand_as(pixels), labels)["motion_accuracy"] == 0  # still
    digit = labels.div(4, rounding_mode="floor")
    other = torch.where(labels < 40, (digit + 1) % 10 * 4 + labels % 4, labels)[labels < 40]
    found = scores(judge, pixels[labels < 40], other)
    assert found["frame_accuracy"] < 0.1
    assert found["motion_accuracy"] == 1.0
    assert found["clip_accuracy"] < 0.1
    halves = scores(
        judge, torch.cat([pixels[:, :, :, 16:], pixels[:, :, :, :16]], dim=3)[labels >= 40], labels[labels >= 40]
    )
    assert halves["crossing_motion_accuracy"] == 1.0  # either may go left
    assert halves["crossing_frame_accuracy"] < 0.3  # but the upper digit is the first


def test_others_are_not_judged(judge, clips):
    judge.reset()
    judge.update(clips[0][:2], torch.tensor([len(PROMPTS) - 1] * 2))
    with pytest.raises(UserError, match="no clips to judge"):
        judge.compute()
    with pytest.raises(UserError, match=r"scores\.judge\.prompts asks for no digit that moves"):
        MovingDigitsJudge(prompts=["a cat"], train=list, val=list)


def test_black_clips_have_a_middle_and_no_motion():
    black = torch.zeros(3, 17, 32, 32, dtype=torch.uint8)
    assert around_centroid(black.transpose(0, 1)).shape == (17, 3, 16, 16)
    assert motion(black) is None
