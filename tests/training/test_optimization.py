import copy
import math

import pytest
import torch
from torch import nn

from grn.runtime.errors import UserError
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


def test_a_resumed_optimiser_has_its_own_settings_and_the_others_state():
    """lr, betas, weight decay and the whole schedule are those that are given now; moments and step go on."""
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))

    def build(learning_rate, betas, weight_decay, **schedule):
        optimizer = adamw(network, learning_rate=learning_rate, betas=betas, weight_decay=weight_decay)
        return optimizer, learning_rate_schedule(optimizer, **schedule)

    def step(optimizer, schedule):
        network(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    first = build(1e-2, (0.9, 0.95), 0.1, name="constant", warmup_steps=0, total_steps=10)
    for _ in range(4):
        step(*first)
    saved = [copy.deepcopy(part.state_dict()) for part in first]

    second = build(1e-3, (0.8, 0.99), 0.5, name="cosine", warmup_steps=2, total_steps=10)
    for part, state in zip(second, saved):
        part.load_state_dict(copy.deepcopy(state))
    optimizer, schedule = second
    rates = []
    for number in range(4, 7):
        assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.99)] * 2
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
        assert {group["lr"] for group in optimizer.param_groups} == {schedule.get_last_lr()[0]}
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.state_dict()["state"][0]["step"] == number
        step(*second)
    expected = [1e-3 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (number - 2) / 8))) for number in range(4, 7)]
    assert rates == pytest.approx(expected)

    again = build(1e-2, (0.9, 0.95), 0.1, name="constant", warmup_steps=0, total_steps=10)
    for part, state in zip(again, saved):
        part.load_state_dict(copy.deepcopy(state))
    assert again[0].state_dict()["param_groups"] == saved[0]["param_groups"]
    assert {key: again[1].state_dict()[key] for key in ("last_epoch", "base_lrs", "_last_lr")} == {
        key: saved[1][key] for key in ("last_epoch", "base_lrs", "_last_lr")
    }
