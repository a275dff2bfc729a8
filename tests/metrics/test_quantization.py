import math

import pytest
import torch

from grn.method import hbq
from grn.metrics.quantization import QuantizationScores
from grn.runtime.errors import UserError


def scored(*batches, rounds=3):
    scores = QuantizationScores(batches[0].shape[1], rounds)
    for batch in batches:
        scores.update(batch)
    return scores.compute()


def test_against_the_definition():
    features = torch.rand(6, 5, 2, 3, 4, generator=torch.Generator().manual_seed(0)) ** 2 * 2 - 1
    got = scored(features)
    for m in range(1, 4):
        error = (features - hbq.quantize(features, m)).abs()
        assert got[f"error_{m}"] == pytest.approx(error.mean().item(), rel=1e-6)
        assert got[f"error_max_{m}"] == pytest.approx(error.max().item(), rel=1e-6)
        assert got[f"error_max_{m}"] <= 2.0**-m
    bits = hbq.tokens(features, 3, "bit").unflatten(1, (3, 5)).double()
    for m in range(3):
        entropies = []
        for c in range(5):
            p = bits[:, m, c].mean().item()
            entropies.append(-p * math.log2(p) - (1 - p) * math.log2(1 - p))
        assert got[f"bit_entropy_{m + 1}"] == pytest.approx(sum(entropies) / 5, rel=1e-6)


def test_batches_add_up():
    features = torch.rand(6, 2, 1, 3, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    whole, parts = scored(features), scored(features[:1], features[1:])
    assert whole == pytest.approx(parts)


def test_a_bit_that_never_changes_carries_nothing():
    features = torch.full((2, 1, 1, 4, 4), 0.8)
    features[0] = 0.6
    got = scored(features, rounds=3)
    assert got["bit_entropy_1"] == 0
    assert got["bit_entropy_3"] == 1  # 0.8 is above 0.75 and 0.6 below


def test_nothing_to_score():
    with pytest.raises(UserError, match="the split is empty"):
        QuantizationScores(2, 3).compute()
