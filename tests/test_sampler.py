import math
from itertools import pairwise

import pytest
import torch

from grn.errors import UserError
from grn.sampler import Cosine, EntropyGuided, Labels, Linear, Sampler, normalized_entropy, refine, sample_tokens

SHAPE, CLASSES, NULL = (3, 1, 4, 4), 5, 10


class Network:
    """Logits that depend on tokens, t and label, and a record of what it was asked."""

    def __init__(self, sharpness=1.0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(NULL + 1, CLASSES, *SHAPE, generator=generator, dtype=dtype) * sharpness
        self.mix = torch.randn(CLASSES, CLASSES, generator=generator, dtype=dtype)
        self.rows = []

    def __call__(self, tokens, t, condition):
        assert len(tokens) == len(t) == len(condition)
        self.rows.append((len(tokens), int((condition.index == NULL).sum())))
        seen = self.mix[tokens].movedim(-1, 1)
        return self.table[condition.index] + seen * t.view(-1, 1, 1, 1, 1, 1)


def run(sampler, labels, *, ids=None, seed=0, network=None, callback=None):
    labels = torch.as_tensor(labels)
    return refine(
        network or Network(),
        Labels(labels, NULL),
        sampler,
        shape=SHAPE,
        classes=CLASSES,
        seed=seed,
        ids=torch.arange(len(labels)) if ids is None else ids,
        callback=callback,
    )


def entropy_guided(**changes):
    return EntropyGuided(**{"warmup": 2, "scale": 40.0, "offset": -20.0, "min_steps": 4, "max_steps": 12} | changes)


SCHEDULES = [Linear(8), Cosine(8), entropy_guided()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_same_seed_same_samples_whatever_the_batch(schedule):
    sampler = Sampler(schedule, temperature=1.2, guidance=2.0, guidance_interval=(0.3, 1.0))
    labels = torch.arange(9) % 3
    whole = run(sampler, labels)
    assert torch.equal(whole.tokens, run(sampler, labels).tokens)
    for rows in (torch.tensor([4]), torch.tensor([8, 0, 5])):
        part = run(sampler, labels[rows], ids=rows)
        assert torch.equal(part.tokens, whole.tokens[rows])
        assert torch.equal(part.steps, whole.steps[rows])
    assert not torch.equal(whole.tokens, run(sampler, labels, seed=1).tokens)


def test_linear_and_cosine_signal_ratios():
    total = torch.tensor([50])
    assert [Linear(50).signal_ratio(i, total).item() for i in (0, 25, 50)] == [0, 0.5, 1]
    cosine = Cosine(50)
    assert cosine.signal_ratio(0, total).item() == 0
    assert cosine.signal_ratio(50, total).item() == 1
    assert cosine.signal_ratio(20, total).item() == pytest.approx(1 - math.cos(math.pi / 2 * 0.4))


@pytest.mark.parametrize("schedule", [Linear(8), Cosine(8)], ids=["linear", "cosine"])
def test_fixed_schedules_take_their_steps_and_end_on_the_samples(schedule):
    steps = []
    refined = run(Sampler(schedule), [0, 1], callback=steps.append)
    assert [s.index.tolist() for s in steps] == [[i, i] for i in range(8)]
    assert refined.steps.tolist() == [8, 8]
    assert steps[-1].t_next.tolist() == [1, 1]
    assert torch.equal(refined.tokens, steps[-1].predicted)
    assert all((a.t_next == b.t).all() for a, b in pairwise(steps))


def test_map_is_sample_where_kept_else_the_first_noise():
    steps = []
    run(Sampler(Linear(10)), [0] * 64, callback=steps.append)
    noise = steps[0].tokens
    for step, following in pairwise(steps):
        assert torch.equal(following.tokens, torch.where(step.kept, step.predicted, noise))
        assert step.kept.float().mean().item() == pytest.approx(step.t_next[0].item(), abs=0.03)


def test_unconditional_rows_only_inside_the_interval():
    network = Network()
    run(Sampler(Linear(10), guidance=2.0, guidance_interval=(0.35, 0.75)), [1, 2, 3], network=network)
    inside = [0.35 < i / 10 < 0.75 for i in range(10)]
    assert network.rows == [(6, 3) if guided else (3, 0) for guided in inside]


def test_guidance_of_one_is_free():
    network = Network()
    run(Sampler(Linear(5), guidance=1.0), [1, 2], network=network)
    assert network.rows == [(2, 0)] * 5


def test_guidance_formula():
    """With a temperature near zero the samples are the argmax of u + s*(c - u)."""
    network = Network()
    steps = []
    run(Sampler(Linear(3), temperature=1e-4, guidance=3.0), [4], network=network, callback=steps.append)
    for step in steps[1:]:  # t = 0 is not inside (0, 1)
        conditional = network(step.tokens, step.t, Labels(torch.tensor([4]), NULL))
        unconditional = network(step.tokens, step.t, Labels(torch.tensor([NULL]), NULL))
        guided = unconditional + 3.0 * (conditional - unconditional)
        assert torch.equal(step.predicted, guided.argmax(1))


def test_entropy_guided_follows_design():
    schedule = EntropyGuided()  # the reference's constants for B
    entropy = torch.tensor([0.5, 0.93, 0.95, 1.0])
    further = [15, 31, 45, 45]  # clip(round(700 E - 620), 15, 45)
    total = schedule.plan(entropy)
    assert total.tolist() == [5 + n for n in further]
    for step in range(6):
        assert schedule.signal_ratio(step, total).tolist() == pytest.approx([step / 50] * 4)
    t = 0.1
    for step in range(6, 10):
        expected = [t + (1 - t) * (step - 5) / n for n in further]
        assert schedule.signal_ratio(step, total).tolist() == pytest.approx(expected)
    assert schedule.temperature_scale(4, total).tolist() == [1] * 4
    expected = [min(max((n - 10) / 40 + 0.5, 0.5), 1.0) for n in further]
    assert schedule.temperature_scale(5, total).tolist() == pytest.approx(expected)


def test_finished_samples_leave_the_batch_and_others_go_on():
    network, steps = Network(), []
    network.table[0] *= 20  # class 0 is certain of its tokens, class 1 is not
    network.table[1] *= 0.01
    sampler = Sampler(entropy_guided(scale=30.0, offset=-10.0))
    refined = run(sampler, [0, 1, 0, 1], network=network, callback=steps.append)
    assert refined.steps[0] == refined.steps[2] == 4
    assert (refined.steps[[1, 3]] > 8).all()
    assert [rows for rows, _ in network.rows] == [4] * 4 + [2] * (int(refined.steps.max()) - 4)
    assert steps[-1].rows.tolist() == [1, 3]
    assert (refined.decision_entropy[[0, 2]] < refined.decision_entropy[[1, 3]]).all()
    for row in range(4):
        mine = [s for s in steps if row in s.rows.tolist()]
        assert len(mine) == refined.steps[row]
        last = mine[-1].rows.tolist().index(row)
        assert torch.equal(refined.tokens[row], mine[-1].predicted[last])


def test_sampling_follows_the_distribution():
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    u = (torch.arange(10_000) + 0.5) / 10_000
    tokens = sample_tokens(probabilities.log().view(1, 4, 1).expand(1, 4, 10_000), u.view(1, -1))
    assert (tokens.flatten().bincount(minlength=4) / 10_000).tolist() == pytest.approx(probabilities.tolist(), abs=2e-4)
    ends = sample_tokens(torch.zeros(1, 4, 2), torch.tensor([[0.0, 1 - 2**-24]]))
    assert ends.tolist() == [[0, 3]]


def test_entropy_is_normalised():
    assert normalized_entropy(torch.zeros(2, 16, 3, 4)).tolist() == pytest.approx([1, 1])
    certain = torch.zeros(1, 2, 3)
    certain[:, 0] = 100
    assert normalized_entropy(certain).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Linear(0), "sampler.schedule.steps"),
        (lambda: EntropyGuided(warmup=30), "sampler.schedule.min_steps"),
        (lambda: EntropyGuided(max_steps=10), "sampler.schedule.max_steps"),
        (lambda: Sampler(temperature=0), "sampler.temperature"),
        (lambda: Sampler(guidance_interval=(0.5, 0.2)), "sampler.guidance_interval"),
    ],
)
def test_wrong_values_name_their_key(make, key):
    with pytest.raises(UserError, match=key):
        make()
