import pytest
import torch

from grn.checkpoints.native import read_checkpoint
from grn.checkpoints.reading import check_targets
from grn.errors import UserError


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "grn.files.os.system",
        "grn.files.write_text",
        "grn.data.pool.ProcessPoolExecutor",
        "grn.nowhere.Thing",
        "grn.data.streaming.ShardStream",
        "grn.data.encoding.ShardEncoder",
        "grn.data.packing.PackPlace",
        "subprocess",
        "",
    ],
)
def test_what_is_no_class_of_ours_is_not_called(target, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no part of GRN") as caught:
        check_targets({"a": [{"b": {"_target_": target}}]}, "x.ckpt")
    assert "\n" not in str(caught.value)
    config = {"training": {"_target_": "grn.training.TokenizerModule"}, "model": {"_target_": target}}
    torch.save({"state_dict": {}, "config": config, "global_step": 1}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"ckpt: .*x\.ckpt is not to be trusted"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_nothing_hides_what_is_called(tmp_path):
    hostile = {"_target_": "os.system", "command": "touch x"}
    for weights in (({"x": (hostile,)},), "${callbacks.x}", ["${callbacks.x}"]):
        config = {
            "training": {"_target_": "grn.training.TokenizerModule"},
            "model": {"_target_": "grn.networks.tokenizer.HBQTokenizer", "weights": weights},
            "callbacks": {"x": hostile},
        }
        torch.save({"state_dict": {}, "config": config, "global_step": 1}, tmp_path / "x.ckpt")
        with pytest.raises(UserError, match=r"^ckpt: .* is not to be trusted: it (wants to call|refers to)"):
            read_checkpoint(tmp_path / "x.ckpt")


def test_what_is_ours_and_what_is_trusted(monkeypatch):
    weights = "grn.metrics.digits_classifier.digits_classifier_weights"
    check_targets({"_target_": "grn.data.images.ImageShardsDataModule"}, "x")
    check_targets({"_target_": "grn.training.RefinerModule", "x": {"_target_": weights, "_partial_": True}}, "x")
    with pytest.raises(UserError, match="GRN_TRUST=mine"):
        check_targets({"_target_": "mine.Network"}, "x")
    monkeypatch.setenv("GRN_TRUST", "other,mine")
    check_targets({"_target_": "mine.Network"}, "x")


def test_a_config_that_is_none(tmp_path):
    torch.save({"state_dict": {}, "config": ["junk"], "global_step": 1}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="not a checkpoint of GRN"):
        read_checkpoint(tmp_path / "x.ckpt")
