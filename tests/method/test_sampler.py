import math
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from refining import refine, refine_queue

from grn.method.sampler import Sampler, normalized_entropy, sample_tokens, token_entropies
from grn.method.schedules import Cosine, EntropyGuided, Linear, Shifted, fixed, grid_of
from grn.networks.class_refiner import ClassRefiner
from grn.networks.conditions import Labels
from grn.runtime.errors import UserError
from grn.sampling.refinement import Refined, Start

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


def varied_network():
    """Certain of high classes, not of low ones: under `entropy_guided` they take all numbers of steps."""
    network = Network()
    network.table[:NULL] *= torch.linspace(0.5, 2.2, NULL, dtype=torch.float64).view(-1, 1, 1, 1, 1, 1)
    return network


def run(sampler, labels, *, ids=None, seed=0, network=None, **others):
    """By `refine`; with a `batch_size`, what `refine_queue` yields."""
    labels = torch.as_tensor(labels)
    return (refine_queue if "batch_size" in others else refine)(
        network or Network(),
        Labels(labels, NULL),
        sampler,
        shape=SHAPE,
        classes=CLASSES,
        seed=seed,
        ids=torch.arange(len(labels)) if ids is None else ids,
        **others,
    )


def joined(groups):
    """What a queue gave, in its order."""
    places, refined = zip(*groups)
    order = torch.cat(places).argsort()
    return Refined(*(torch.cat([vars(r)[field.name] for r in refined])[order] for field in fields(Refined)))


def assert_same(a, b):
    for field in fields(Refined):
        torch.testing.assert_close(
            getattr(a, field.name), getattr(b, field.name), rtol=0, atol=1e-6, equal_nan=True, msg=field.name
        )


def entropy_guided(**changes):
    return EntropyGuided(**{"warmup": 2, "scale": 40.0, "offset": -20.0, "min_steps": 4, "max_steps": 12} | changes)


SCHEDULES = [
    Linear(8),
    Cosine(8),
    Shifted(8),
    entropy_guided(),
    entropy_guided(grid="cosine"),
    entropy_guided(grid="shifted", alpha=2.0, cap=0.95),
]


def named(schedule):
    return type(schedule).__name__ + (f"-{schedule.grid}" if isinstance(schedule, EntropyGuided) else "")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
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


@pytest.mark.parametrize(("alpha", "cap"), [(1.0, 0.999), (1.0, 0.95), (3.0, 0.999), (0.5, 1.0)])
def test_shifted_signal_ratios(alpha, cap):
    """With u = min(1, (i+1)/(N-1)) after prediction i: t = cap * (1 - cos(pi/2 * shift(u))), the last one whole."""
    total = torch.tensor([50])
    expected = [0.0]
    for i in range(50):
        noise = 1 - min(1, (i + 1) / 49)
        shifted = 1 - alpha * noise / (1 + (alpha - 1) * noise)
        expected.append(cap * (1 - math.cos(math.pi / 2 * shifted)))
    expected[50] = 1.0
    schedule = Shifted(50, alpha=alpha, cap=cap)
    assert [schedule.signal_ratio(i, total).item() for i in range(51)] == pytest.approx(expected, abs=1e-12)
    assert expected[49] == pytest.approx(cap)
    if (alpha, cap) == (1.0, 0.999):
        assert Shifted(50) == schedule
        assert schedule.signal_ratio(22, total).item() == pytest.approx(0.238, abs=5e-4)  # the reference's, at i = 21


def test_shifted_signal_ratios_of_few_steps_and_of_many_samples():
    assert [Shifted(1).signal_ratio(i, torch.tensor([1])).item() for i in (0, 1)] == [0, 1]
    assert [Shifted(2).signal_ratio(i, torch.tensor([2])).item() for i in (0, 1, 2)] == pytest.approx([0, 0.999, 1])
    assert Shifted(50).signal_ratio(torch.tensor([[3], [49]]), torch.tensor([50, 50])).shape == (2, 2)


@pytest.mark.parametrize("make", [Linear, Cosine, Shifted])
def test_fixed_schedules_take_every_step_however_small(make):
    assert run(Sampler(make(250)), [1, 2]).steps.tolist() == [250, 250]


@pytest.mark.parametrize("schedule", [Linear(8), Cosine(8), Shifted(8)], ids=["linear", "cosine", "shifted"])
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


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0.0, 1.0), [True] * 10),
        ((0.0, 0.25), [True] * 3 + [False] * 7),
        ((0.0, 0.0), [False] * 10),
        ((0.1, 0.5), [False] * 2 + [True] * 3 + [False] * 5),
    ],
)
def test_guidance_acts_at_the_first_step_where_low_is_zero(interval, expected):
    network = Network()
    run(Sampler(Linear(10), guidance=2.0, guidance_interval=interval), [1, 2], network=network)
    assert network.rows == [(4, 2) if guided else (2, 0) for guided in expected]


def test_guidance_of_one_is_free():
    network = Network()
    run(Sampler(Linear(5), guidance=1.0), [1, 2], network=network)
    assert network.rows == [(2, 0)] * 5


def test_guidance_formula():
    """With a temperature near zero the samples are the argmax of u + s*(c - u)."""
    network = Network()
    steps = []
    run(Sampler(Linear(3), temperature=1e-4, guidance=3.0), [4], network=network, callback=steps.append)
    assert steps[0].t.item() == 0  # inside (0, 1), as the authors have it
    for step in steps:
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


def grid_by_formula(grid, u):
    if grid == "cosine":
        return 1 - math.cos(math.pi / 2 * u)
    noise = 1 - u
    return 0.95 * (1 - math.cos(math.pi / 2 * (1 - 3 * noise / (1 + 2 * noise))))


@pytest.mark.parametrize("grid", ["cosine", "shifted"])
def test_adaptive_steps_advance_along_any_grid(grid):
    """u goes 1/max_steps a step up to the decision, then evenly; of `shifted` one step is left for t = cap to 1."""
    schedule = EntropyGuided(grid=grid, alpha=3.0, cap=0.95)
    total = schedule.plan(torch.tensor([0.5, 0.93, 1.0]))
    assert total.tolist() == [20, 36, 50]
    whole = 1 if grid == "shifted" else 0
    for row, steps in enumerate(total.tolist()):
        path = [step / (50 - whole) for step in range(6)]
        path += [path[5] + (1 - path[5]) * k / (steps - whole - 5) for k in range(1, steps - whole - 4)]
        expected = [grid_by_formula(grid, u) for u in path] + [1.0] * whole
        found = [schedule.signal_ratio(step, total)[row].item() for step in range(steps + 1)]
        assert found == pytest.approx(expected, abs=1e-9)
        assert found[-1] == 1
    fixed_one = {"cosine": Cosine(50), "shifted": Shifted(50, alpha=3.0, cap=0.95)}[grid]
    steps = torch.arange(51)
    torch.testing.assert_close(schedule.signal_ratio(steps, total[2:]), fixed_one.signal_ratio(steps, total[2:]))


def test_adaptive_steps_along_a_grid_are_all_taken():
    """0.999 is the cap of a grid, not a sign that a sample is done."""
    network, sampler = varied_network(), Sampler(entropy_guided(grid="shifted"))
    refined = run(sampler, torch.arange(9), network=network)
    assert torch.equal(refined.steps, sampler.schedule.plan(refined.decision_entropy))
    assert refined.steps.unique().numel() > 2


def test_the_fixed_schedule_of_a_grid():
    assert fixed(entropy_guided(), 7) == Linear(7)
    assert fixed(entropy_guided(grid="cosine", cap=0.5), 7) == Cosine(7)
    assert fixed(entropy_guided(grid="shifted", alpha=2.0, cap=0.95), 7) == Shifted(7, alpha=2.0, cap=0.95)
    for schedule in (Linear(9), Cosine(9), Shifted(9, alpha=2.0, cap=0.95)):
        assert fixed(EntropyGuided(**grid_of(schedule)), 9) == fixed(schedule, 9) == schedule


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


def double_network(channels=3, classes=5, size=4):
    torch.manual_seed(0)
    network = ClassRefiner(
        channels=channels,
        classes=classes,
        num_labels=NULL,
        size=size,
        depth=2,
        width=16,
        heads=2,
        bottleneck=8,
        context_start=1,
        context_tokens=2,
    )
    generator = torch.Generator().manual_seed(0)  # entropies, and so plans, hang on these numbers
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return network.double().eval()


@pytest.fixture(scope="module")
def refiner():
    network = double_network()
    return lambda tokens, t, condition: network(tokens, t, condition.index)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_samples_are_the_same_however_they_are_batched(refiner, schedule):
    """In float64, where rounding cannot flip a draw: to the last token."""
    sampler = Sampler(schedule, temperature=1.2, guidance=2.0, guidance_interval=(0.3, 1.0))
    labels = torch.arange(80) % NULL
    whole = run(sampler, labels, network=refiner)
    logits = refiner(whole.tokens[:1], torch.ones(1), Labels(labels[:1], NULL))
    assert logits.dtype == torch.float64
    if schedule.decide_at is not None:
        assert whole.steps.unique().numel() > 3  # or nothing would ever leave early
    for batch_size in (1, 7, 64):
        rows = slice(0, 5 if batch_size == 1 else 80)
        queue = joined(run(sampler, labels[rows], network=refiner, batch_size=batch_size))
        assert_same(queue, Refined(*(getattr(whole, field.name)[rows] for field in fields(Refined))))
    assert_same(joined(run(sampler, labels, network=refiner, batch_size=21, bucketed=True)), whole)
    chunks = torch.arange(80).split(32)
    assert_same(joined((ids, run(sampler, labels[ids], ids=ids, network=refiner)) for ids in chunks), whole)


def test_the_batch_is_full_while_samples_wait():
    network, steps = Network(), []
    sampler = Sampler(entropy_guided(scale=30.0, offset=-10.0))
    network.table[0] *= 20  # certain: four steps
    network.table[1] *= 0.01
    labels = torch.arange(12) % 2
    groups = list(run(sampler, labels, network=network, batch_size=4, callback=steps.append))
    assert [len(rows) for rows, _ in groups] == [4, 4, 4]
    assert all(rows.tolist() == sorted(rows.tolist()) for rows, _ in groups)
    assert torch.cat([rows for rows, _ in groups]).sort().values.tolist() == list(range(12))
    assert groups[0][0].tolist() != [0, 1, 2, 3]  # who is done first comes first
    taken = joined(groups).steps
    for row in range(12):
        assert [int(s.index[s.rows == row]) for s in steps if row in s.rows] == list(range(taken[row]))
    waiting = [s for s in steps if s.rows.max() < 11]
    assert len(waiting) > 8
    assert all(len(s.rows) == 4 for s in waiting)
    assert len(network.rows) == len(steps)


def test_guidance_of_mixed_steps_asks_for_those_inside_the_interval_alone():
    network, steps = varied_network(), []
    sampler = Sampler(entropy_guided(), guidance=2.0, guidance_interval=(0.35, 0.75))
    list(run(sampler, torch.arange(20) % NULL, network=network, batch_size=6, callback=steps.append))
    inside = [int(((s.t > 0.35) & (s.t < 0.75)).sum()) for s in steps]
    assert network.rows == [(len(s.t) + n, n) for s, n in zip(steps, inside)]
    assert len(set(inside)) > 3


def test_buckets_are_few():
    """Any number of rows between 1 and twice the batch becomes a multiple of an eighth of the batch."""
    sampler = Sampler(entropy_guided(), guidance=2.0, guidance_interval=(0.3, 1.0))
    seen = {}
    for bucketed in (False, True):
        network = varied_network()
        list(run(sampler, torch.arange(150) % NULL, network=network, batch_size=32, bucketed=bucketed))
        seen[bucketed] = {rows for rows, _ in network.rows}
    assert all(rows % 4 == 0 for rows in seen[True])
    assert len(seen[True]) <= 16 < len(seen[False])


@pytest.mark.parametrize("update", ["redraw", "psi"])
def test_compiled_steps_draw_the_same_and_are_few_graphs(update, monkeypatch):
    """Whatever the seed and how many samples are left; the graphs run as they are."""
    graphs, compile = [], torch.compile
    backend = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda call: compile(call, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    sampler = Sampler(entropy_guided(), guidance=2.0, guidance_interval=(0.3, 1.0), update=update, kappa=0.5)
    labels, sizes = torch.arange(12) % NULL, set()
    for seed in (3, -1, 2**64 - 2):
        found, expected = (
            joined(
                run(
                    sampler, labels, network=varied_network(), batch_size=6, seed=seed, compiled=compiled,
                    callback=lambda step: sizes.add(len(step.rows)),
                )
            )
            for compiled in (True, False)
        )  # fmt: skip
        assert_same(found, expected)
        assert found.tokens.unique().numel() == CLASSES
    assert len(sizes) > 3
    assert 1 <= len(graphs) <= 5  # first and other sizes, one sample alone; with and without guidance
    torch._dynamo.reset()


@pytest.mark.full
def test_steps_compiled_in_earnest_draw_nearly_all_the_same():
    """Inductor's softmax rounds otherwise: a draw may flip, and what follows of its sample."""
    labels = torch.arange(24) % NULL
    sampler = Sampler(Linear(6), guidance=2.0)
    network = Network(dtype=torch.float32)
    found, expected = (
        joined(run(sampler, labels, network=network, batch_size=24, compiled=compiled)) for compiled in (True, False)
    )
    assert (found.tokens == expected.tokens).flatten(1).all(dim=1).double().mean() > 0.9
    torch.testing.assert_close(found.trace[:, 0], expected.trace[:, 0])


def test_trace_holds_the_entropy_of_every_step():
    steps = []
    sampler = Sampler(entropy_guided())
    refined = joined(run(sampler, torch.arange(9), batch_size=4, network=varied_network(), callback=steps.append))
    assert refined.trace.shape == (9, 12)
    for row in range(9):
        seen = torch.cat([s.entropy[s.rows == row] for s in steps])
        assert torch.equal(refined.trace[row, : refined.steps[row]], seen)
        assert refined.trace[row, refined.steps[row] :].isnan().all()
        assert refined.entropy[row] == seen[-1]
        assert refined.decision_entropy[row] == seen[2]


def test_a_queue_of_none_and_batches_of_none():
    assert list(run(Sampler(Linear(3)), torch.empty(0, dtype=torch.long), batch_size=4)) == []
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        list(run(Sampler(Linear(3)), [0], batch_size=0))


# --- from given tokens ----------------------------------------------------------------------------------------------


def given(number):
    return torch.randint(CLASSES, (1, *SHAPE), generator=torch.Generator().manual_seed(9)).expand(number, *SHAPE)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_full_strength_is_the_plain_run(schedule):
    sampler, labels = Sampler(schedule, guidance=2.0), torch.arange(9)
    plain = run(sampler, labels)
    assert_same(run(sampler, labels, start=Start(given(9))), plain)
    assert_same(run(sampler, labels, start=Start(given(9), redraw=torch.ones(9, 1, 1, 4, 4, dtype=torch.bool))), plain)


def test_strength_starts_on_the_way():
    steps, tokens = [], given(400)
    refined = run(Sampler(Linear(10)), [0] * 400, start=Start(tokens, 0.65), callback=steps.append)
    assert [s.t[0].item() for s in steps] == pytest.approx([0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert (refined.steps == 7).all()
    assert refined.trace[:, 7:].isnan().all()
    noise = run(Sampler(Linear(1)), [0] * 400, callback=steps.append) and steps[-1].tokens
    known = steps[0].tokens != noise  # where the given token shows
    assert torch.equal(steps[0].tokens[known], tokens[known])
    assert known.float().mean().item() == pytest.approx(0.35 * (1 - 1 / CLASSES), abs=0.01)
    assert (run(Sampler(Linear(10)), [0] * 2, start=Start(given(2), 0.9)).steps == 9).all()  # 1 - 0.9 < 0.1 by rounding
    assert (run(Sampler(Linear(10)), [0] * 2, start=Start(given(2), 1e-3)).steps == 1).all()


@pytest.mark.parametrize("strength", [0.95, 0.5])
def test_strength_with_entropy_guidance(strength):
    """t = 0.05 lies before the decision at 2/12, t = 0.5 behind it: then the first step decides."""
    steps, sampler, network = [], Sampler(entropy_guided()), varied_network()
    refined = run(sampler, torch.arange(9), start=Start(given(9), strength), network=network, callback=steps.append)
    assert steps[0].t.tolist() == pytest.approx([1 - strength] * 9)
    assert (steps[0].t_next > steps[0].t).all()
    decided = 2 if strength > 0.9 else 0
    assert torch.equal(refined.decision_entropy, steps[decided].entropy)
    total = sampler.schedule.plan(refined.decision_entropy)
    assert total.unique().numel() > 2
    if decided:
        assert torch.equal(refined.steps, total)  # 0.05 < 1/12: not one step less
    else:
        ratios = sampler.schedule.signal_ratio(torch.arange(1, 13), total[:, None])
        assert torch.equal(refined.steps, total - (ratios <= 0.5).sum(1))
    queue = joined(run(sampler, torch.arange(9), start=Start(given(9), strength), network=network, batch_size=2))
    assert_same(queue, refined)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_masked_tokens_stay(schedule, strength):
    steps, tokens = [], given(9)
    redraw = torch.zeros(9, 1, 1, 4, 4, dtype=torch.bool)
    redraw[..., 1:3] = True
    kept = ~redraw.expand_as(tokens)
    start = Start(tokens, strength, redraw)
    network = varied_network()
    refined = joined(
        run(Sampler(schedule), torch.arange(9), network=network, start=start, batch_size=4, callback=steps.append)
    )
    for seen in (refined.tokens, *(s.tokens for s in steps), *(s.predicted for s in steps)):
        count = len(seen)
        assert torch.equal(seen[kept[:count]], tokens[:count][kept[:count]])
    assert (refined.tokens != tokens)[~kept].float().mean() > 0.4
    assert torch.equal(
        run(Sampler(schedule), [1, 2], start=Start(tokens[:2], strength, redraw[:2] & False)).tokens, tokens[:2]
    )


def test_what_is_said_of_given_tokens_decides_nothing():
    redraw = torch.zeros(9, 1, 1, 4, 4, dtype=torch.bool)
    redraw[..., 1:3] = True
    plain, sure = varied_network(), varied_network()
    sure.table *= torch.where(redraw[0], 1.0, 40.0)
    start = Start(given(9), 1.0, redraw)
    kinds = [run(Sampler(entropy_guided()), torch.arange(9), start=start, network=n) for n in (plain, sure)]
    assert_same(*kinds)
    assert kinds[0].steps.unique().numel() > 2
    whole = [run(Sampler(entropy_guided()), torch.arange(9), network=n).entropy for n in (plain, sure)]
    assert (whole[0] - whole[1]).abs().min() > 0.01


def test_sampling_follows_the_distribution():
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    u = (torch.arange(10_000) + 0.5) / 10_000
    tokens = sample_tokens(probabilities.log().view(1, 4, 1).expand(1, 4, 10_000), u.view(1, -1))
    assert (tokens.flatten().bincount(minlength=4) / 10_000).tolist() == pytest.approx(probabilities.tolist(), abs=2e-4)
    ends = sample_tokens(torch.zeros(1, 4, 2), torch.tensor([[0.0, 1 - 2**-24]]))
    assert ends.tolist() == [[0, 3]]


def test_entropy_is_normalised():
    def normalized(logits, free):
        return normalized_entropy(token_entropies(logits), free, logits.shape[1])

    assert normalized(torch.zeros(2, 16, 3, 4), torch.ones(2, 1, 1)).tolist() == pytest.approx([1, 1])
    certain = torch.zeros(1, 2, 3)
    certain[:, 0] = 100
    assert normalized(certain, torch.ones(1, 1)).item() == pytest.approx(0, abs=1e-6)
    certain[:, :, 2] = 0
    for free, expected in (([1, 1, 1], 1 / 3), ([0, 1, 1], 0.5), ([0, 0, 1], 1), ([1, 1, 0], 0), ([0, 0, 0], 0)):
        found = normalized(certain, torch.tensor([free], dtype=torch.float32))
        assert found.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Linear(0), "sampler.schedule.steps"),
        (lambda: EntropyGuided(warmup=30), "sampler.schedule.min_steps"),
        (lambda: EntropyGuided(max_steps=10), "sampler.schedule.max_steps"),
        (lambda: EntropyGuided(grid="straight"), r"sampler.schedule.grid must be one of linear, cosine, shifted"),
        (lambda: EntropyGuided(cap=1.1), "sampler.schedule.cap"),
        (lambda: Shifted(cap=0.0), "sampler.schedule.cap must be above 0 and at most 1, got 0.0"),
        (lambda: Shifted(alpha=0.0), "sampler.schedule.alpha"),
        (lambda: Sampler(temperature=0), "sampler.temperature"),
        (lambda: Start(torch.zeros(1, 1, 1, 1, 1), strength=0.0), "strength"),
        (lambda: Start(torch.zeros(1, 1, 1, 1, 1), strength=1.5), "strength"),
        (lambda: Sampler(guidance_interval=(0.5, 0.2)), "sampler.guidance_interval"),
        (lambda: Sampler(update="memory"), "sampler.update must be one of redraw, psi"),
        (lambda: Sampler(kappa=1.5), "sampler.kappa"),
        (lambda: Sampler(kappa_form="cap"), "sampler.kappa_form must be one of constant, rescaled"),
        (lambda: Sampler(kappa_window=(0.5, 0.2)), "sampler.kappa_window"),
    ],
)
def test_wrong_values_name_their_key(make, key):
    with pytest.raises(UserError, match=key):
        make()
