"""Training and drawing in memory are what grn.train and grn.sample do, at the same draws."""

import copy
import math

import pytest
import torch
from test_generation import tiny_bundle

from grn.method.corruption import token_loss
from grn.method.sampler import Sampler
from grn.method.schedules import EntropyGuided, Linear
from grn.sampling.request import Request
from grn.studies import class_refiners
from grn.studies.class_refiners import draw, refinement_loss, train
from grn.training import RefinerModule

GUIDED = EntropyGuided(warmup=1, scale=150.0, offset=-137.0, min_steps=2, max_steps=8)


@pytest.fixture
def bundle():
    """In float32, as networks train."""
    tiny = tiny_bundle(Sampler(Linear(4)))
    tiny.network.float()
    return tiny


@pytest.fixture
def data():
    """Tokens int64 [90, 3, 1, 4, 4] and labels int64 [90]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, (90, 3, 1, 4, 4), generator=generator), torch.randint(5, (90,), generator=generator)


def own_loss(module, tokens, labels, seed, step):
    _, logits = module.predict_corrupted(tokens, labels, seed=seed, ids=torch.arange(len(tokens)), step=step)
    return token_loss(logits, tokens)


def test_the_loss_is_that_of_training(bundle, data):
    module = RefinerModule(bundle)  # by default with the signal ratios of digits_c2i
    for step in (0, 7):
        expected = own_loss(module, *data, 3, step)
        assert torch.equal(refinement_loss(bundle.network, *data, 3, step), expected)
        assert not torch.equal(refinement_loss(bundle.network, *data, 4, step), expected)


def test_the_loop_is_adamw_of_that_loss_averaged(bundle, data, monkeypatch):
    """Three steps, a warm-up of two, by hand."""
    monkeypatch.setattr(class_refiners, "WARMUP", 2)
    tokens, labels = data
    initial = copy.deepcopy(bundle.network.state_dict())
    averaged = train(bundle.network, tokens, labels, steps=3, seed=5)
    ended = copy.deepcopy(bundle.network.state_dict())
    assert not averaged.training

    bundle.network.load_state_dict(initial)
    module, weights = RefinerModule(bundle), list(bundle.network.parameters())
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0)
    order, averages = torch.Generator().manual_seed(5), []
    for step, rate in enumerate((0.5, 1, (1 + math.cos(0)) / 2)):
        optimizer.param_groups[0]["lr"] = 1.5e-3 * rate
        rows = torch.randint(90, (64,), generator=order)
        dropped = torch.rand(64, generator=order) < 0.1
        optimizer.zero_grad()
        own_loss(module, tokens[rows], labels[rows].masked_fill(dropped, 5), 5, step).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        averages = [
            a.lerp(w.detach(), 0.01) for a, w in zip(averages or [w.detach().clone() for w in weights], weights)
        ]
    assert all(torch.equal(ended[name], value) for name, value in bundle.network.state_dict().items())
    assert not any(torch.equal(ended[name], initial[name]) for name, _ in bundle.network.named_parameters())
    for average, expected in zip(averaged.parameters(), averages):
        torch.testing.assert_close(average, expected)


@pytest.mark.parametrize("schedule", [Linear(3), GUIDED], ids=["linear", "entropy"])
def test_samples_are_those_of_the_pair(bundle, schedule):
    """In the order of their labels, whichever are done first."""
    labels, sampler = torch.arange(9) % 5, Sampler(schedule, guidance=1.5)
    expected = bundle.eval().generate(Request(labels=tuple(labels.tolist()), seed=5, sampler=sampler))
    assert expected.steps.unique().numel() > (schedule is GUIDED)
    assert torch.equal(draw(bundle.network, labels, sampler, 5, batch_size=2), expected.tokens)
