import json
import math
import re
from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_dir
from test_generation import GUIDED, tiny_bundle

from grn.checkpoints.sampler_config import build_sampler
from grn.method.schedules import EntropyGuided
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.runtime.failures import MISTAKES, explain
from grn.sampling import calibrate as command
from grn.sampling.calibration import decision_entropies, fit, steps_taken, wanted_spread
from grn.sampling.request import Request


def entropies(number, seed=0):
    return 0.6 + 0.03 * torch.randn(number, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spread", [None, 3.0, 9.0])
@pytest.mark.parametrize("target", [21.5, 30, 46])
def test_fit_hits_the_mean_and_the_spread(target, spread):
    schedule, entropy = EntropyGuided(), entropies(1000)
    largest = math.sqrt((target - 20) * (50 - target))
    if spread is not None and spread > largest:
        with pytest.raises(UserError, match=r"spread=9.* must be above 0 and below"):
            fit(schedule, entropy, target=target, spread=spread)
        return
    found = fit(schedule, entropy, target=target, spread=spread)
    steps = found.plan(entropy).double()
    assert steps.mean().item() == pytest.approx(target, abs=0.02)
    assert steps.std().item() == pytest.approx(spread or largest / 2, rel=0.02)
    assert 20 <= steps.min() < steps.max() <= 50
    assert (steps[entropy.argsort()].diff() >= 0).all()  # the harder, the more
    fresh = steps_taken(found, entropies(1000, seed=1)).double().mean().item()
    assert fresh == pytest.approx(target, rel=0.05)


def test_steps_taken_are_those_of_the_sampler():
    """Also where the last of many steps lead beyond t = 0.99, and are not taken."""
    bundle = tiny_bundle(GUIDED)
    for most in (8, 260):
        schedule = EntropyGuided(warmup=1, min_steps=2, max_steps=most)
        sampler = replace(GUIDED, schedule=schedule)
        request = Request(num=10, seed=3, sampler=sampler)
        entropy = decision_entropies(bundle, request, batch_size=4)
        sampler = replace(sampler, schedule=fit(schedule, entropy, target=most * 0.6))
        ((_, refined),) = bundle.generate_queue(replace(request, sampler=sampler), batch_size=10)
        assert torch.equal(refined.decision_entropy, entropy)
        assert torch.equal(refined.steps, steps_taken(sampler.schedule, entropy))
        assert (refined.steps < sampler.schedule.plan(entropy)).any() == (most == 260)


def test_measuring_takes_no_step_beyond_the_decision():
    bundle, calls = tiny_bundle(GUIDED), []
    bundle.network.register_forward_pre_hook(lambda *_: calls.append(None))
    schedule = EntropyGuided(warmup=3, min_steps=10, max_steps=50)
    told = []
    decision_entropies(
        bundle,
        Request(num=10, sampler=replace(GUIDED, schedule=schedule)),
        batch_size=5,
        advance=told.append,
    )
    assert len(calls) == 2 * 4
    assert sum(told) == 10


@pytest.mark.parametrize(
    ("entropy", "arguments", "complaint"),
    [
        (torch.full((50,), 1.0), {"target": 30}, "entropies of all 50 samples are the same at step wp=5"),
        (torch.full((50,), math.nan), {"target": 30}, "are the same"),
        (torch.tensor([0.5, 0.7] * 25), {"target": 22, "spread": 7.0}, "take too few values"),  # 20 and 24 steps
        (entropies(50), {"target": 20}, "target_steps=20 must be between tmin=20 and tmax=50"),
        (entropies(50), {"target": 60}, "must be between"),
        (entropies(50), {"target": math.nan}, "must be between"),
        (entropies(50), {"target": 30, "spread": 0}, "sampler=linear"),
    ],
)
def test_what_cannot_be_fitted(entropy, arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        fit(EntropyGuided(), entropy, **arguments)


def test_the_default_spread_is_half_of_the_largest():
    everyone_at_an_end = torch.tensor([20.0] * 2 + [50.0])
    assert wanted_spread(EntropyGuided(), 30.0, None) == pytest.approx(everyone_at_an_end.std(correction=0).item() / 2)


# --- the command ----------------------------------------------------------------------------------------------------


def composed(verb, out, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(verb, ["ckpt=x", f"out={out}", *overrides])


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(command, "load_refiner", lambda *_, **__: (tiny_bundle(GUIDED), {"ckpt": "x", "step": 7}))


CALIBRATE = ("target_steps=9", "tmin=4", "tmax=16", "wp=2", "num=200", "device=cpu")


def test_fresh_samples_take_the_steps_asked_for(untrained, tmp_path):
    """By what was written, with another seed, at the temperature it was measured at."""
    report = command.calibrate(composed("calibrate", tmp_path, *CALIBRATE, "spread=3", "sampler.temperature=1.2"))
    assert report == json.loads((tmp_path / "calibration.json").read_text())
    assert report["fitted"]["steps_mean"] == pytest.approx(9, abs=0.1)
    assert report["fitted"]["steps_std"] == pytest.approx(3, rel=0.1)
    assert report["fresh"]["steps_mean"] == pytest.approx(9, rel=0.05)
    sample = composed("sample", tmp_path, "sampler=calibrated", f"sampler.file={tmp_path}/sampler.yaml")
    sampler = build_sampler(sample.sampler, GUIDED)
    assert repr(sampler) == report["sampler"]
    assert (sampler.temperature, sampler.guidance) == (1.2, 1.5)
    assert (sampler.schedule.warmup, sampler.schedule.min_steps, sampler.schedule.max_steps) == (2, 4, 16)
    groups = tiny_bundle(GUIDED).generate_queue(Request(num=400, seed=11, sampler=sampler), batch_size=100)
    steps = torch.cat([refined.steps for _, refined in groups]).double()
    assert steps.mean().item() == pytest.approx(9, rel=0.05)


def test_the_limits_are_the_checkpoints_unless_given(untrained, tmp_path):
    command.calibrate(composed("calibrate", tmp_path, "target_steps=4", "num=100", "device=cpu"))
    sample = composed("sample", tmp_path, "sampler=calibrated", f"sampler.file={tmp_path}/sampler.yaml")
    schedule = build_sampler(sample.sampler).schedule
    assert (schedule.warmup, schedule.min_steps, schedule.max_steps) == (1, 2, 8)


def test_ranks_share_the_samples(untrained, tmp_path, monkeypatch):
    measured = []
    measure = command.decision_entropies
    monkeypatch.setattr(
        command, "decision_entropies", lambda *a, **k: measured.append(measure(*a, **k)) or measured[-1]
    )
    alone = command.calibrate(composed("calibrate", tmp_path / "alone", *CALIBRATE))
    (whole,) = measured
    for rank in range(2):
        monkeypatch.setattr(command, "rank_and_world_size", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(command, "gather", lambda own: [whole[::2], whole[1::2]])
        assert command.calibrate(composed("calibrate", tmp_path / str(rank), *CALIBRATE)) == alone
    assert torch.equal(measured[1], whole[::2])
    assert torch.equal(measured[2], whole[1::2])
    assert not (tmp_path / "1").exists()  # the first one writes for all


def test_what_misses_on_fresh_samples_is_not_written(untrained, tmp_path, monkeypatch):
    drifting = torch.cat([entropies(100), entropies(100) + 0.05])
    monkeypatch.setattr(command, "decision_entropies", lambda *_, **__: drifting)
    with pytest.raises(UserError, match=r"num=200: .* off target_steps=9; give a larger num"):
        command.calibrate(composed("calibrate", tmp_path, *CALIBRATE))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["target_steps=17"], "between tmin=4 and tmax=16"),
        (["target_steps=many"], "target_steps=many: give a number"),
        (["spread=wide"], "spread=wide: give a number"),
        (["spread=9"], "spread=9"),
        (["wp=5"], r"sampler\.schedule\.min_steps must be above warmup"),
        (["num=many"], "num=many must be a whole number, at least 1"),
        (["batch_size=many"], "batch_size=many must be a whole number, at least 1"),
        (["num=15"], "num=15 is not a multiple of 10"),
        (["sampler=linear"], "only an entropy-guided schedule is calibrated"),
        (["sampler=checkpoint"], "only an entropy-guided schedule is calibrated"),
    ],
)
def test_mistakes(untrained, tmp_path, overrides, complaint):
    with pytest.raises(MISTAKES) as error:
        command.calibrate(composed("calibrate", tmp_path, *CALIBRATE, *overrides))
    assert re.search(complaint, explain(error.value))
