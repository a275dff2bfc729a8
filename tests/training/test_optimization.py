import pytest
import torch
from torch import nn

from grn.errors import UserError
from grn.training.optimization import FiniteLoss, adamw, clip_gradients, learning_rate_schedule


def rates(name, steps, *, warmup=4, total=20):
    network = nn.Linear(2, 2)
    optimizer = adamw(network, learning_rate=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = learning_rate_schedule(optimizer, name=name, warmup_steps=warmup, total_steps=total)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_warmup_then_constant():
    assert rates("constant", 7) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1])


def test_cosine_ends_at_a_hundredth():
    seen = rates("cosine", 21)
    assert seen[4] == pytest.approx(1)
    assert seen[12] == pytest.approx(0.505)
    assert seen[20] == pytest.approx(0.01)


def test_unknown_schedule_names_the_key():
    with pytest.raises(UserError, match=r"training\.lr_schedule"):
        rates("linear", 1)


def test_biases_and_gains_do_not_decay():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(4))
    groups = adamw(network, learning_rate=1.0, betas=(0.9, 0.95), weight_decay=0.1).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.1, 1), (0.0, 3)]


def test_clipping_returns_the_norm_before():
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 3.0)
    assert clip_gradients([p], None).item() == pytest.approx(6)
    assert p.grad.norm().item() == pytest.approx(6)
    assert clip_gradients([p], 0.5).item() == pytest.approx(6)
    assert p.grad.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_a_loss_that_was_once_nan_stays_noticed():
    class Module:
        global_step = 7

    watch = FiniteLoss()
    watch.watch(torch.tensor(1.0))
    watch.check(Module())
    watch.watch(torch.tensor(float("nan")))
    watch.watch(torch.tensor(1.0))
    with pytest.raises(UserError, match=r"by step 7.*training\.learning_rate"):
        watch.check(Module())
