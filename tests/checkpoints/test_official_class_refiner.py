import pickle

import pytest
import torch

from grn.checkpoints.mapping import load_strict
from grn.checkpoints.official_class_refiner import load_official_class_refiner
from grn.errors import UserError
from grn.networks.class_refiner import ClassRefiner


@pytest.fixture
def official(golden, tmp_path):
    """A file laid out as `GRN_ind_B_ep599.pth`, with the golden weights; the averages are scaled to be told apart."""
    state = {"net." + k.removeprefix("state."): v for k, v in golden("c2i_ind").items() if k.startswith("state.")}
    contents = {"model": state, "optimizer": {"state": {}}, "epoch": 599}
    contents["model_ema1"] = {name: tensor * 2 for name, tensor in state.items()}
    contents["model_ema2"] = {name: tensor * 3 for name, tensor in state.items()}
    path = tmp_path / "GRN_ind_B_ep599.pth"
    torch.save(contents, path)
    return path


def test_model_and_both_averages_load(official):
    loaded = load_official_class_refiner(official)
    network = ClassRefiner(
        channels=4, classes=8, num_labels=10, size=8, depth=4, width=48, heads=4, bottleneck=16,
        context_start=2, context_tokens=4,
    )  # fmt: skip
    for state, factor in ((loaded["model"], 1), (loaded["ema"]["0.9999"], 2), (loaded["ema"]["0.9996"], 3)):
        load_strict(network, state, source="golden")
        torch.testing.assert_close(network.label_embedding.weight, loaded["model"]["label_embedding.weight"] * factor)


def test_another_size_is_one_line(official):
    network = ClassRefiner(
        channels=4, classes=8, num_labels=10, size=8, depth=4, width=48, heads=4, bottleneck=12,
        context_start=2, context_tokens=4,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"token_embedding\.expand\.weight is \(48, 16\) in the file, \(48, 12\)"):
        load_strict(network, load_official_class_refiner(official)["model"], source=str(official))


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


def test_hostile_and_foreign_files_are_refused(tmp_path, capsys):
    hostile = tmp_path / "hostile.pth"
    torch.save({"model": Hostile()}, hostile)
    old = tmp_path / "old.pth"
    old.write_bytes(pickle.dumps(Hostile()))
    foreign = tmp_path / "foreign.pth"
    torch.save({"state_dict": {}}, foreign)
    unknown = tmp_path / "unknown.pth"
    states = {name: {"net.surprise": torch.zeros(1)} for name in ("model", "model_ema1", "model_ema2")}
    torch.save(states, unknown)
    for path, words in [
        (hostile, "cannot be read"),
        (old, "cannot be read"),
        (foreign, "not an official"),
        (unknown, "'surprise'"),
        (tmp_path / "missing.pth", "no file"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            load_official_class_refiner(path)
        assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out
