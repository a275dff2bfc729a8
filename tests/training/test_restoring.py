"""States of wrong shapes, types or names are refused in a line before anything is restored: the kernels trust them."""

import copy
import math

import pytest
import torch
from torch import nn

from grn.callbacks import EMA
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError
from grn.training import TokenizerModule
from grn.training.optimization import adamw, learning_rate_schedule
from grn.training.restoring import check_weights


def trained():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = adamw(network, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    network(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    return network, optimizer


def test_a_sound_state_is_restored():
    _, optimizer = trained()
    _, other = trained()
    state = copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        values["exp_avg"] += 1
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    fresh = adamw(nn.Linear(4, 8), learning_rate=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    fresh.load_state_dict(fresh.state_dict())  # before its first step it holds nothing


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("state", 0, "exp_avg"), torch.zeros(3), r"parameter 0, exp_avg is \(3,\) in the file, \(8, 4\) here"),
        (("state", 1, "exp_avg_sq"), torch.zeros(8, 2), r"exp_avg_sq is \(8, 2\) in the file, \(2, 8\) here"),
        (("state", 0, "exp_avg"), torch.zeros(8, 4, dtype=torch.int8), "is torch.int8 in the file, torch.float32 here"),
        (("state", 0, "exp_avg"), torch.zeros(8, 4).to_sparse(), "exp_avg is not a tensor"),
        (("state", 0, "exp_avg"), "much", "exp_avg is not a tensor"),
        (("state", 0, "step"), torch.zeros(2), r"step is \(2,\) in the file"),
        (("state", 0, "step"), torch.tensor(math.nan), "step is nan"),
        (("state", 0, "step"), torch.tensor(-1.0), "step is -1"),
        (("state", 0, "max_exp_avg_sq"), torch.zeros(8, 4), "does not have step, exp_avg and exp_avg_sq"),
        (("state", 0), None, "does not have step"),
        (("state", 9), {}, "is of other parameters"),
        (("state",), [], "is of other parameters"),
        (("param_groups", 0, "params"), [0], "is not of 4 parameters in 2 groups"),
        (("param_groups", 0, "params"), [0, 7], "is of other parameters"),
        (("param_groups",), "none", "is not of 4 parameters"),
        (("param_groups",), [3, 4], "is not of 4 parameters"),
    ],
)
def test_a_state_that_does_not_fit_is_one_line(path, value, words):
    _, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    *way, last = path
    place = state
    for key in way:
        place = place[key]
    place[last] = value
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UserError, match=rf"^ckpt_path: the optimizer's state.*{words}") as error:
        optimizer.load_state_dict(state)
    assert "\n" not in str(error.value)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


def test_weights_and_averages_that_do_not_fit():
    network, _ = trained()
    own = network.state_dict()
    check_weights(own, {name: tensor.clone() for name, tensor in own.items()}, "the weights")
    for restored, words in (
        (own | {"0.weight": torch.zeros(3)}, r"0\.weight is \(3,\) in the file, \(8, 4\) here"),
        ({name: own[name] for name in list(own)[1:]}, "is not a tensor in the file"),
        (own | {"9.weight": torch.zeros(3)}, r"9\.weight is not of this model"),
        (own | {"0.bias": own["0.bias"].long()}, "is torch.int64 in the file"),
        ("none", "are not named tensors"),
    ):
        with pytest.raises(UserError, match=f"^ckpt_path: the weights.*{words}"):
            check_weights(own, restored, "the weights")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state_dict": None}, "the weights are not named tensors"),
        ({"state_dict": [1]}, "the weights are not named tensors"),
        ({"optimizer_states": []}, "the file has 0 states of optimizers, this run has 1"),
        ({"optimizer_states": None}, "the file has no states of optimizers, this run has 1"),
        ({"lr_schedulers": [{}, {}]}, "the file has 2 states of schedules, this run has 1"),
    ],
)
def test_parts_that_are_not_all_there(changes, words):
    """Lightning would go on with an optimiser that has forgotten everything."""
    network = HBQTokenizer(latent_channels=2, dim=4, decoder_dim=4, multipliers=[1, 2], temporal=[False])
    module = TokenizerModule(network, perceptual_weight=0.0, gan_weight=0.0)
    whole = {"state_dict": module.state_dict(), "optimizer_states": [{}], "lr_schedulers": [{}]}
    module.on_load_checkpoint(dict(whole))
    with pytest.raises(UserError, match=f"^ckpt_path: {words}"):
        module.on_load_checkpoint(whole | changes)


def test_averages_that_are_none():
    with pytest.raises(UserError, match=r"^ckpt_path: its ema does not hold averages by decay"):
        EMA(decays=[0.9], use=0.9).on_load_checkpoint(None, None, {"ema": [1]})


@pytest.mark.parametrize("step", ["7", None, -1, 2.5, True])
def test_a_schedule_goes_on_at_a_whole_step(step):
    _, optimizer = trained()
    schedule = learning_rate_schedule(optimizer, name="constant", warmup_steps=2, total_steps=9)
    with pytest.raises(UserError, match=r"^ckpt_path: the learning rate's schedule is at step"):
        schedule.load_state_dict(schedule.state_dict() | {"last_epoch": step})
