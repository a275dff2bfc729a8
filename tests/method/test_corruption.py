import pytest
import torch

from grn.method import corruption
from grn.training.refiner import bin_by_signal_ratio

IDS = torch.arange(512)


def test_shift_golden(golden_meta):
    for t, alpha, expected in golden_meta["shift"]:
        assert corruption.shift(t, alpha) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("mean", "std"), [(-0.8, 0.8), (-1.3, 1.3)])
def test_signal_ratio_is_logistic_normal(mean, std):
    t = corruption.signal_ratio(0, torch.arange(20_000), 0, mean=mean, std=std)
    assert ((t > 0) & (t < 1)).all()
    logit = torch.logit(t.double())
    assert logit.mean().item() == pytest.approx(mean, abs=0.03)
    assert logit.std().item() == pytest.approx(std, abs=0.03)


@pytest.mark.parametrize("alpha", [1.0, 3.0, 0.5])
def test_signal_ratios_are_shifted(alpha):
    plain, shifted = (corruption.signal_ratio(7, IDS, 4, mean=-1.3, std=1.3, alpha=a).double() for a in (1.0, alpha))
    noise = 1 - plain
    torch.testing.assert_close(1 - shifted, alpha * noise / (1 + (alpha - 1) * noise), atol=1e-6, rtol=0)
    assert torch.equal(plain.float(), corruption.signal_ratio(7, IDS, 4, mean=-1.3, std=1.3))


def test_the_realized_ratio_is_the_share_of_kept_tokens():
    """Of so many classes, what is redrawn is never the true token: what is equal was kept."""
    tokens = torch.full((64, 4, 3, 2, 2), 2**31)
    t = torch.linspace(0, 1, 64)
    draws = {"seed": 3, "ids": IDS[:64], "step": 9}
    kept = (corruption.corrupt(tokens, t, 2**31, **draws) == tokens).flatten(1)
    told = corruption.realized_ratio((4, 3, 2, 2), t, **draws)
    assert told.dtype == torch.float32
    torch.testing.assert_close(told, kept.sum(1) / 48)
    assert (told - t).abs().max() > 0.05
    assert told[0] == 0
    assert told[-1] == 1


@pytest.mark.parametrize("classes", [2, 16])
def test_corruption_keeps_a_share_t_and_randomises_the_rest(classes):
    tokens = torch.full((512, 4, 1, 8, 8), classes - 1)
    t = torch.linspace(0, 1, 512)
    noisy = corruption.corrupt(tokens, t, classes, seed=1, ids=IDS, step=0)
    assert noisy.min() == 0
    assert noisy.max() == classes - 1
    same = (noisy == tokens).flatten(1).float().mean(1)
    torch.testing.assert_close(
        same.view(16, 32).mean(1), (t + (1 - t) / classes).view(16, 32).mean(1), atol=0.02, rtol=0
    )
    changed = noisy[noisy != tokens].bincount(minlength=classes)[:-1].float()
    assert (changed / changed.sum() - 1 / (classes - 1)).abs().max() < 0.01


def test_corruption_at_the_ends():
    tokens = torch.randint(16, (4, 2, 1, 3, 3))
    untouched = corruption.corrupt(tokens, torch.ones(4), 16, seed=0, ids=IDS[:4], step=0)
    assert torch.equal(untouched, tokens)


def test_draws_do_not_depend_on_the_split_over_ranks():
    tokens = torch.randint(16, (8, 2, 1, 3, 3))
    t = corruption.signal_ratio(3, IDS[:8], 5, mean=-0.8, std=0.8)
    whole = corruption.corrupt(tokens, t, 16, seed=3, ids=IDS[:8], step=5)
    ranks = [corruption.corrupt(tokens[r], t[r], 16, seed=3, ids=IDS[r], step=5) for r in (slice(0, 4), slice(4, 8))]
    assert torch.equal(whole, torch.cat(ranks))
    assert not torch.equal(whole, corruption.corrupt(tokens, t, 16, seed=3, ids=IDS[:8], step=6))


def test_loss_is_float32_cross_entropy_over_all_tokens():
    tokens = torch.randint(5, (2, 3, 1, 4, 4))
    logits = torch.randn(2, 5, 3, 1, 4, 4, dtype=torch.bfloat16)
    loss = corruption.token_loss(logits, tokens)
    by_hand = -torch.log_softmax(logits.float(), 1).gather(1, tokens.unsqueeze(1)).mean()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, by_hand)


def test_accuracy_by_bins():
    tokens = torch.zeros(3, 1, 1, 1, 2, dtype=torch.long)
    logits = torch.zeros(3, 2, 1, 1, 1, 2)
    logits[:, 1] = torch.tensor([[-1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]]).view(3, 1, 1, 1, 2)
    accuracy = corruption.token_accuracy(logits, tokens)
    assert accuracy.tolist() == [0.5, 1.0, 0.0]
    sums, counts = bin_by_signal_ratio(accuracy, torch.tensor([0.05, 0.95, 1.0]))
    assert counts.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert sums.tolist() == [0.5, 0, 0, 0, 0, 0, 0, 0, 0, 1.0]


def test_packed_loss_golden():
    """Of the authors' release: an image, a clip and a clip with a given frame, by predicted positions."""
    losses, positions = torch.tensor([0.8822822, 0.9286961, 0.8841127]), [8 * 14, 3 * 6 * 4, 2 * 4 * 7]
    total, weight = corruption.weighted_sums(losses, positions, 0.5)
    assert (total / weight).item() == pytest.approx(0.8976309, abs=1e-6)
    total, weight = corruption.weighted_sums(losses, positions, 0)
    assert (total / weight).item() == pytest.approx(losses.mean().item(), abs=1e-6)
