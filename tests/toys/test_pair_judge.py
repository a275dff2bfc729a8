"""The judge of pairs reads real pairs, each half by itself, and tells held-out pairs apart."""

import pytest
import torch

from grn.data.text_images import TextImageDataModule
from grn.runtime.errors import UserError
from grn.toys.digit_pairs import HELDOUT_PAIRS, PAIRS, DigitPairsSource, pair_caption
from grn.toys.digits import digit_caption
from grn.toys.pair_judge import DigitPairsJudge, single_digits

PROMPTS = [digit_caption(4), *(pair_caption(*pair) for pair in PAIRS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "t2i"
    DigitPairsSource(copies=1, val_copies=1).write(root)
    arguments = {"resolutions": [[32, 32], [32, 64]], "max_tokens": 4096, "batch_size": 1, "eval_batch_size": 200}
    return TextImageDataModule(name="digits_t2i", root=root, **arguments)


@pytest.fixture
def judge(data):
    splits = {name: lambda name=name: data.split_dataloader(name) for name in ("train", "val")}
    return DigitPairsJudge(prompts=PROMPTS, **splits)


@pytest.fixture(scope="module")
def pairs(data):
    """(images uint8 [100, 3, 32, 64], numbers of their prompts), of held-out digits."""
    images, labels = [], []
    for batch in data.split_dataloader("val"):
        for pixels, caption in zip(batch["pixels"], batch["caption"]):
            if " left of " in caption:
                images.append(pixels[:, 0])
                labels.append(PROMPTS.index(caption))
    return torch.stack(images), torch.tensor(labels)


def test_it_reads_real_pairs_and_nothing_else(judge, pairs):
    images, labels = pairs
    assert len(images) == 100
    for batch in zip(images.split(30), labels.split(30)):
        judge.update(*batch)
    judge.update(images[:2], torch.tensor([0, 0]))  # a single digit was asked for: not judged
    scores = judge.compute()
    assert all(scores[f"pair_accuracy{apart}"] > 0.9 for apart in ("", "_shown", "_heldout"))
    assert scores["judge_val_accuracy"] > 0.95
    judge.reset()
    judge.update(images.roll(32, dims=-1), labels)  # the digits have changed places
    swapped = judge.compute()
    assert swapped["pair_accuracy"] < 0.2  # pairs of one digit alone stay right
    assert abs(swapped["left_accuracy"] - 0.1) < 0.1


def test_heldout_pairs_are_counted_apart(judge, pairs):
    images, labels = pairs
    apart = torch.tensor([PAIRS[label - 1] in HELDOUT_PAIRS for label in labels.tolist()])
    spoiled = torch.where(apart.view(-1, 1, 1, 1), 0, images)
    judge.update(spoiled, labels)
    scores = judge.compute()
    assert scores["pair_accuracy_heldout"] == 0
    assert scores["pair_accuracy_shown"] > 0.9
    assert scores["pair_accuracy"] == pytest.approx(0.9 * scores["pair_accuracy_shown"])


def test_single_digits_are_found(data):
    found = list(single_digits(data.split_dataloader("val")))
    assert sum(len(batch["label"]) for batch in found) == 297
    assert all(batch["pixels"].shape[1:] == (3, 1, 32, 32) for batch in found)


def test_mistakes_are_explained(data):
    with pytest.raises(UserError, match=r"scores\.judge\.prompts asks for no pair of digits"):
        DigitPairsJudge(prompts=["a cat"], train=list, val=list)
    with pytest.raises(UserError, match="has no images"):
        DigitPairsJudge(prompts=PROMPTS, train=list, val=list)
