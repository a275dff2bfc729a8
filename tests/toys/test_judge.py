import pytest
import torch

from grn.runtime.errors import UserError
from grn.toys.judge import DigitsJudge


@pytest.fixture(scope="module")
def judge(splits):
    return DigitsJudge(**splits)


def test_reads_val_digits(judge, digits):
    judge.reset()
    judge.update(*digits["val"])
    scores = judge.compute()
    assert scores["judge_val_accuracy"] >= 0.97
    assert scores["judge_accuracy"] == scores["judge_val_accuracy"]


def test_counts_what_was_asked_for(judge, digits):
    """Training digits, read without fail, of which every other seven was asked for as a three."""
    images, labels = digits["train"]
    known = judge.read(images) == labels
    sevens, ones = images[known & (labels == 7)][:20], images[known & (labels == 1)][:10]
    judge.reset()
    judge.update(sevens, torch.tensor([7, 3] * 10))
    judge.update(ones, torch.full((10,), 1))
    scores = judge.compute()
    assert scores["judge_accuracy"] == pytest.approx(20 / 30)
    assert scores["judge_accuracy_7"] == scores["judge_accuracy_1"] == 1
    assert scores["judge_accuracy_3"] == 0
    assert "judge_accuracy_2" not in scores


def test_noise_is_not_read_as_asked(judge):
    judge.reset()
    judge.update(torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8), torch.arange(200) % 10)
    assert judge.compute()["judge_accuracy"] < 0.3


def test_bad_input_is_one_line(judge, digits, splits, make_split):
    images, labels = (values[:5] for values in digits["val"])
    with pytest.raises(UserError, match="classes 0 to 9"):
        judge.update(images, labels + 10)
    judge.reset()
    with pytest.raises(UserError, match="no images to judge"):
        judge.compute()
    with pytest.raises(UserError, match="held-out split has no labels"):
        DigitsJudge(train=splits["train"], val=make_split(images))
    with pytest.raises(UserError, match="two classes"):
        DigitsJudge(train=make_split(images, torch.zeros(5, dtype=torch.int64)), val=splits["val"])
