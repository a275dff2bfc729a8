import pytest
import torch

from grn.checkpoints.official_class_refiner import CLASS_REFINER_RULES
from grn.runtime.errors import UserError
from grn.weights.mapping import Rule, load_strict, rename, rename_back

RULES = [
    Rule(r"net\.(\d+)\.(a|b)\.(?P<p>weight|bias)", r"layers.\1.\2.\g<p>"),
    Rule(r"swap\.(?P<first>\w+)\.(?P<second>\w+)", r"swapped.\g<second>.\g<first>"),
    Rule(r"matrix", "table", convert=lambda m: m.T, revert=lambda m: m.T),
    Rule(r"fixed\.\d+", None),
]


def test_back_is_the_inverse():
    official = {
        "net.3.a.weight": torch.rand(1),
        "net.12.b.bias": torch.rand(1),
        "swap.x.y": torch.rand(1),
        "matrix": torch.rand(2, 3),
    }
    ours = rename(official | {"fixed.0": torch.rand(1)}, RULES)
    assert list(ours) == ["layers.3.a.weight", "layers.12.b.bias", "swapped.y.x", "table"]
    again = rename_back(ours, RULES)
    assert list(again) == list(official)
    assert all(torch.equal(again[name], official[name]) for name in official)


def test_dots_are_dots():
    with pytest.raises(UserError, match=r"'layersx3\.a\.weight' has no name in official checkpoints"):
        rename_back({"layersx3.a.weight": torch.rand(1)}, RULES)


def test_two_names_for_one():
    rules = [Rule(r"a\.\d", "ours")]
    with pytest.raises(UserError, match=r"x\.ckpt: parameter 'a\.2' is one of two that mean our ours"):
        rename({"a.1": torch.rand(1), "a.2": torch.rand(1)}, rules, source="x.ckpt")


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        (Rule(r"list\.\d+\.(weight|bias)", r"one.\1"), "does not tell which of many official names"),
        (Rule("a", "b", convert=torch.neg), "does not say how to revert"),
    ],
)
def test_rules_that_lose_something_are_not_readable_backwards(rule, complaint):
    with pytest.raises(ValueError, match=complaint):
        rename_back({"one.weight": torch.rand(1)}, [rule])


@pytest.mark.parametrize("name", ["c2i_ind", "c2i_bit"])
def test_the_class_refiner_goes_both_ways(golden, name):
    official = {k.removeprefix("state."): v for k, v in golden(name).items() if k.startswith("state.")}
    ours = rename(official, CLASS_REFINER_RULES)
    again = rename_back(ours, CLASS_REFINER_RULES)
    assert len(again) == len(ours) > 40
    assert all(torch.equal(again[key], official[key]) for key in again)
    assert all(key == "pos_embed" or "freqs" in key for key in official.keys() - again.keys())


def test_a_network_on_the_meta_device_takes_the_tensors_themselves():
    with torch.device("meta"):
        network = torch.nn.Linear(2, 3)
    state = {"weight": torch.rand(3, 2), "bias": torch.rand(3)}
    load_strict(network, state, source="x")
    assert network.weight.data_ptr() == state["weight"].data_ptr()
    assert network.weight.requires_grad


def test_the_remedy_is_the_callers():
    with pytest.raises(UserError, match=r"^x is of another size than the model: bias is missing .*; look again$"):
        load_strict(torch.nn.Linear(1, 1), {"weight": torch.rand(1, 1)}, source="x", remedy="look again")
