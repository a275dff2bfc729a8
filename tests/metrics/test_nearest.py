import numpy as np
import pytest
import torch

from grn.metrics import nearest
from grn.metrics.nearest import NearestTrainingDistance
from grn.runtime.errors import UserError


@pytest.fixture(scope="module")
def score(splits):
    return NearestTrainingDistance(**splits)


def test_copies_are_found_at_distance_zero(score, digits):
    score.reset()
    score.update(digits["train"][0][100:150], digits["train"][1][100:150])
    assert (score.distances() == 0).all()
    assert score.neighbours().tolist() == list(range(100, 150))
    assert score.compute()["nn_median_ratio"] == 0


@pytest.mark.parametrize("chunk", [64, 10_000])
def test_distances_are_the_definition(splits, digits, monkeypatch, chunk):
    monkeypatch.setattr(nearest, "CHUNK", chunk)
    score = NearestTrainingDistance(**splits)
    images = digits["val"][0][:20]
    for some in images.split(7):
        score.update(some)
    a, b = (x.double().mean(dim=1) / 255 for x in (images, digits["train"][0]))
    table = (a[:, None] - b[None]).square().mean(dim=(2, 3)).sqrt()
    torch.testing.assert_close(score.distances(), table.min(dim=1).values, rtol=1e-5, atol=0)
    torch.testing.assert_close(table.gather(1, score.neighbours()[:, None])[:, 0], score.distances(), rtol=1e-5, atol=0)


def test_deciles_and_ratio(score, digits):
    score.reset()
    score.update(digits["val"][0])
    scores = score.compute()
    assert scores["nn_median_ratio"] == pytest.approx(1)
    deciles = np.quantile(score.distances().numpy(), np.arange(1, 10) / 10)
    for side in ("generated", "val"):
        assert [scores[f"nn_decile_{tenth}_{side}"] for tenth in range(1, 10)] == pytest.approx(deciles.tolist())
        assert scores[f"nn_median_{side}"] == pytest.approx(deciles[4])


def test_black_and_white_are_one_apart(make_split):
    white = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    score = NearestTrainingDistance(train=make_split(white), val=make_split(white // 2))
    score.update(torch.zeros_like(white[:1]))
    assert score.distances().tolist() == pytest.approx([1.0])


def test_bad_input_is_one_line(score, digits, splits, make_split):
    with pytest.raises(UserError, match=r"scores\.nearest: images of \[3, 28, 28\]"):
        score.update(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))
    score.reset()
    with pytest.raises(UserError, match="no images to compare"):
        score.compute()
    with pytest.raises(UserError, match="held-out images are in the training split"):
        NearestTrainingDistance(train=splits["train"], val=splits["train"])
    with pytest.raises(UserError, match="held-out split has no images"):
        NearestTrainingDistance(train=splits["train"], val=make_split(digits["train"][0][:0]))
