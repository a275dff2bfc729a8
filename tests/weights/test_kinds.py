"""What a run trains, by its config."""

import pytest

from grn.weights.kinds import kind_of

OWN = {"_target_": "somebodys.training.Module"}
TEXT = {"_target_": "grn.networks.text_refiner.TextRefiner"}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"training": {"_target_": "grn.training.RefinerModule"}}, "refiner"),
        ({"training": {"_target_": "grn.training.Nobody"}, "tokenizer": {"ckpt": "runs/t"}}, None),
        ({"training": OWN, "model": TEXT, "tokenizer": {"ckpt": "runs/t"}}, "text refiner"),
        ({"training": OWN, "model": {"_target_": "somebodys.Network"}, "tokenizer": {"ckpt": "runs/t"}}, "refiner"),
        ({"training": OWN, "model": {}, "tokenizer": {"ckpt": None}}, "tokenizer"),
        ({"training": {"_target_": 3}}, None),
        ({"training": "abc"}, None),
        ({}, None),
    ],
)
def test_kinds(config, kind):
    assert kind_of(config) == kind
