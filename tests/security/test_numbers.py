"""Numbers that are none: weights and logits of NaN or infinity, settings beyond all bounds."""

import math
import time

import pytest
import torch
import yaml
from checkpoints import contents, saved
from refining import refine

from grn.checkpoints.native import load_tokenizer
from grn.checkpoints.sampler_config import read_sampler, write_sampler
from grn.method.sampler import Sampler
from grn.method.schedules import Cosine, EntropyGuided, Linear, Shifted
from grn.networks.conditions import Labels
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError, check_number


def network(bad, *, at=0.0, rows=None, unconditional=False):
    """Logits of zeros, but for one of the samples `rows` (places in a batch) from signal ratio `at` on."""

    def predict(tokens, t, condition):
        logits = torch.zeros(len(tokens), 4, *tokens.shape[1:])
        null = condition.index == condition.null_label
        chosen = (t >= at) & (null if unconditional else ~null)
        logits[chosen, 1, 0, 0, 0, 0] = bad
        return logits

    return predict


def drawn(predict, sampler):
    ids = torch.arange(3)
    return refine(predict, Labels(ids, 9), sampler, shape=(2, 1, 2, 2), classes=4, seed=0, ids=ids)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("schedule", [Linear(5), Cosine(5), Shifted(5), EntropyGuided(1, 5.0, 0.0, 2, 5)])
@pytest.mark.parametrize("at", [0.0, 0.6])
def test_logits_that_are_not_finite_end_in_one_line(schedule, bad, at):
    with pytest.raises(UserError, match=r"^the refiner's logits are not finite with Sampler\(") as told:
        drawn(network(bad, at=at), Sampler(schedule))
    assert "\n" not in str(told.value)


def test_nor_of_the_unconditional_pass():
    sampler = Sampler(Linear(5), guidance=2.0)
    with pytest.raises(UserError, match="not finite"):
        drawn(network(math.inf, unconditional=True), sampler)
    drawn(network(math.inf, unconditional=True), Sampler(Linear(5)))  # which is not computed


def test_finite_ones_are_let_through_whatever_their_size():
    assert drawn(network(1e30), Sampler(Linear(5))).trace.isfinite().all()


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Sampler(temperature="hot"), "sampler.temperature"),
        (lambda: Sampler(temperature=math.nan), "sampler.temperature"),
        (lambda: Sampler(temperature=True), "sampler.temperature"),
        (lambda: Sampler(guidance=math.inf), "sampler.guidance"),
        (lambda: Sampler(guidance=math.nan), "sampler.guidance"),
        (lambda: Sampler(guidance=10**400), "sampler.guidance"),
        (lambda: Sampler(guidance=[1]), "sampler.guidance"),
        (lambda: Sampler(guidance_interval=[0.5]), "sampler.guidance_interval"),
        (lambda: Sampler(guidance_interval=0.5), "sampler.guidance_interval"),
        (lambda: Sampler(guidance_interval="01"), "sampler.guidance_interval"),
        (lambda: Sampler(guidance_interval=[0, None]), "sampler.guidance_interval"),
        (lambda: Sampler(guidance_interval=[math.nan, 1]), "sampler.guidance_interval"),
        (lambda: Linear("many"), "sampler.schedule.steps"),
        (lambda: Linear(2.5), "sampler.schedule.steps"),
        (lambda: Linear(10**9), "sampler.schedule.steps"),
        (lambda: Linear(True), "sampler.schedule.steps"),
        (lambda: Shifted(alpha="a"), "sampler.schedule.alpha"),
        (lambda: Shifted(alpha=math.inf), "sampler.schedule.alpha"),
        (lambda: EntropyGuided(scale=math.nan), "sampler.schedule.scale"),
        (lambda: EntropyGuided(offset=-math.inf), "sampler.schedule.offset"),
        (lambda: EntropyGuided(max_steps=2**63), "sampler.schedule.max_steps"),
        (lambda: EntropyGuided(warmup=None), "sampler.schedule.warmup"),
        (lambda: check_number("x", math.inf, least=0), "x"),
    ],
)
def test_settings_are_finite_numbers(make, key):
    with pytest.raises(UserError, match=rf"^{key}\b.* must be "):
        make()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["state_dict", "ema"])
def test_weights_that_are_not_finite_are_not_loaded(bad, part, tmp_path):
    changed = contents()
    state = changed["state_dict"] if part == "state_dict" else changed["ema"]["0.99"]
    name = next(iter(state))
    state[name].view(-1)[0] = bad
    run, ema = saved(tmp_path, **changed), "none" if part == "state_dict" else None
    with pytest.raises(UserError, match=r"the weights .* are not finite .*: take an earlier checkpoint$"):
        load_tokenizer(run, ema=ema)
    load_tokenizer(run, ema="0.99" if part == "state_dict" else "none")


def test_nor_exported(tmp_path):
    tokenizer = HBQTokenizer(latent_channels=2, dim=4, decoder_dim=4, multipliers=[1, 2], temporal=[False])
    with torch.no_grad():
        next(tokenizer.parameters()).view(-1)[0] = math.nan
    with pytest.raises(UserError, match="are not finite"):
        tokenizer.save_pretrained(tmp_path / "export")
    assert not (tmp_path / "export").exists()


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij")
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n" for before, name in zip("abcdefghi", "bcdefghij")
)


@pytest.mark.parametrize(
    "text", [ALIASES + "schedule: {x: *j}\n", MERGES + "schedule: {}\n", "schedule: " + "[" * 9999]
)
def test_yaml_of_many_values_is_no_sampler(text, tmp_path):
    path = write_sampler(tmp_path / "sampler.yaml", Sampler(), "x")
    assert read_sampler(path).schedule == Linear()
    path.write_text(text)
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"is not a sampler file of python -m grn\.calibrate"):
        read_sampler(path)
    assert time.perf_counter() - start < 20
    path.write_text(
        yaml.safe_dump({"schedule": {"_target_": "grn.method.schedules.Linear", "steps": 3}, "guidance": math.nan})
    )
    with pytest.raises(UserError, match="guidance cannot be nan"):
        read_sampler(path)
