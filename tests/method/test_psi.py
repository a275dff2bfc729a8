import math

import pytest
import torch
from refining import refine
from test_sampler import SCHEDULES, given, joined, named, run, varied_network

from grn.method.psi import kappa_at, reverse_shares
from grn.method.sampler import Sampler
from grn.method.schedules import Cosine, Linear
from grn.networks.conditions import Labels
from grn.sampling.recording import STATES, Recording
from grn.sampling.refinement import Erasure, Start

PSI = [
    {"kappa": 1.0},
    {"kappa": 0.7},
    {"kappa": 0.9, "kappa_form": "rescaled"},
    {"kappa": 0.5, "kappa_window": (0.2, 0.8)},
]


@pytest.mark.parametrize("classes", [2, 4, 16])
@pytest.mark.parametrize(("t", "s"), [(0.0, 0.0), (0.0, 0.3), (0.2, 0.5), (0.6, 0.6), (0.5, 0.99), (0.9, 1.0)])
def test_the_reverse_step_is_bayes_rule(classes, t, s):
    """Of the two factors of its definition, class by class; and from the share of signal t it leads to s."""
    a, k, uniform = (1.0 if s == 0 else t / s), 1, torch.full((classes,), 1 / classes, dtype=torch.float64)
    one = torch.eye(classes, dtype=torch.float64)
    stays, moves, mixes = (x.item() for x in reverse_shares(*torch.tensor([[t], [s]], dtype=torch.float64), classes))
    after = torch.zeros(classes, dtype=torch.float64)
    for i in range(classes):
        likelihood = (a * one[i] + (1 - a) * uniform) * (s * one[k] + (1 - s) * uniform)
        if i == k:
            found = (1 - mixes) * one[k] + mixes * uniform
        else:
            found = stays * one[i] + moves * one[k] + (1 - stays - moves) * uniform
        torch.testing.assert_close(found, likelihood / likelihood.sum(), rtol=0, atol=1e-12)
        after += (t * (i == k) + (1 - t) / classes) * found
    torch.testing.assert_close(after, s * one[k] + (1 - s) * uniform, rtol=0, atol=1e-12)


@pytest.mark.parametrize("update", PSI, ids=str)
def test_every_map_has_its_share_of_signal(update):
    """With a network that knows the sample: of 49,152 tokens as many are right as the corruption of that t leaves."""
    classes, shape, steps = 4, (3, 1, 64, 64), []
    truth = torch.arange(4).repeat(3 * 64 * 64).view(4, *shape) % classes

    def knows(tokens, t, condition):
        return torch.nn.functional.one_hot(truth, classes).movedim(-1, 1) * 100.0

    labels = Labels(torch.zeros(4, dtype=torch.long), 1)
    sampler = Sampler(Cosine(6), update="psi", **update)
    settings = {"shape": shape, "classes": classes, "seed": 3, "ids": torch.arange(4), "callback": steps.append}
    refined = refine(knows, labels, sampler, **settings)
    assert torch.equal(refined.tokens, truth)
    for step in steps:
        t = step.t[0].item()
        expected = t + (1 - t) / classes
        bound = 4.5 * math.sqrt(expected * (1 - expected) / truth.numel()) + 1e-9
        assert (step.tokens == truth).double().mean().item() == pytest.approx(expected, abs=bound)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_kappa_zero_is_the_update_of_the_authors(schedule):
    labels, redraw = torch.arange(9), torch.rand(9, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    for start in (None, Start(given(9), 0.6, redraw)):
        plain, psi = (
            run(Sampler(schedule, guidance=2.0, **update), labels, network=varied_network(), start=start)
            for update in ({}, {"update": "psi", "kappa": 0.0})
        )
        assert torch.equal(plain.tokens, psi.tokens)
        assert torch.equal(plain.steps, psi.steps)


@pytest.mark.parametrize("update", PSI, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES[::3], ids=named)
def test_samples_are_the_same_however_they_are_batched_and_given_tokens_stay(schedule, update):
    steps, tokens, redraw = [], given(9), torch.zeros(9, 1, 1, 4, 4, dtype=torch.bool)
    redraw[..., 1:3] = True
    sampler = Sampler(schedule, guidance=2.0, guidance_interval=(0.3, 1.0), update="psi", **update)
    settings = {"network": varied_network(), "start": Start(tokens, 0.9, redraw)}
    whole = run(sampler, torch.arange(9), callback=steps.append, **settings)
    queue = joined(run(sampler, torch.arange(9), batch_size=2, **settings))
    assert torch.equal(whole.tokens, queue.tokens)
    kept = ~redraw.expand_as(tokens)
    for seen in (whole.tokens, *(s.tokens for s in steps), *(s.predicted for s in steps)):
        assert torch.equal(seen[kept[: len(seen)]], tokens[: len(seen)][kept[: len(seen)]])
    assert not torch.equal(whole.tokens, run(Sampler(schedule, guidance=2.0), torch.arange(9), **settings).tokens)


def test_erased_tokens_are_drawn_again():
    positions = torch.ones(1, 4, 4, dtype=torch.bool)
    sampler, erasure = Sampler(Linear(8), update="psi", kappa=1.0), Erasure(0, 4, positions)
    plain, erased = (
        joined(run(sampler, [0, 1], batch_size=2, erasures=erasures)).tokens for erasures in ((), (erasure,))
    )
    assert not torch.equal(plain[0], erased[0])
    assert torch.equal(plain[1], erased[1])


def test_films_show_what_stays():
    """The reverse step leaves most tokens alone: predictions that stay are "kept", noise that stays "blank"."""
    recording, steps = Recording(), []

    def both(step):
        recording(step)
        steps.append(step)

    run(Sampler(Linear(12), update="psi"), torch.arange(9), network=varied_network(), callback=both)
    held = torch.zeros_like(steps[0].kept)
    for step, moment, following in zip(steps, recording.moments, steps[1:]):
        shown = moment.states.long()
        changed = step.tokens != following.tokens
        assert not changed[shown == STATES.index("kept")].any()
        assert (following.tokens == step.predicted)[shown == STATES.index("filled")].all()
        held = step.kept | (step.stayed & held)
        assert torch.equal(shown <= STATES.index("kept"), held)
    assert step.stayed.double().mean() > 0.2


def test_kappa_over_t():
    t, s = torch.tensor([[0.0, 0.4, 0.9], [0.1, 0.5, 1.0]], dtype=torch.float64)
    assert kappa_at(t, s, 0.7, "constant", (0.0, 1.0)).tolist() == [0.7, 0.7, 0.7]
    assert kappa_at(t, s, 0.7, "constant", (0.4, 0.9)).tolist() == [1.0, 0.7, 1.0]
    found = kappa_at(t, s, 0.7, "rescaled", (0.0, 1.0)).tolist()
    assert found == pytest.approx([1 - 0.3 / 0.9, 1 - 0.3 / 0.5, 1 - 0.3 / 0.9], abs=1e-6)
