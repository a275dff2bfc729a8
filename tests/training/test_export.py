"""python -m grn.export, without its process: checkpoints, official files and exports into one another."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from grn.checkpoints.native import build_network, load_tokenizer, weights_hash
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.training.export import export

SIZES = {"latent_channels": 4, "dim": 8, "decoder_dim": 8}


def exported(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return export(compose("export", [str(override) for override in overrides]))


@pytest.fixture
def run(tmp_path):
    """A run folder as a tokenizer's training leaves it."""
    model = {"_target_": "grn.networks.tokenizer.HBQTokenizer", "weights": None, **SIZES}
    trained, averaged = (build_network(model).state_dict() for _ in range(2))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    contents = {
        "state_dict": {f"network.{name}": tensor for name, tensor in trained.items()},
        "config": {"training": {"_target_": "grn.training.TokenizerModule"}, "model": model},
        "global_step": 12,
        "ema": {"0.99": averaged},
        "ema_use": 0.99,
    }
    torch.save(contents, tmp_path / "run" / "checkpoints" / "last.ckpt")
    return tmp_path / "run"


@pytest.fixture
def official(golden, tmp_path):
    state = {k.removeprefix("state."): v for k, v in golden("tokenizer").items() if k.startswith("state.")}
    torch.save({"ema": state}, tmp_path / "HBQ_image_tokenizer_16dim_M4.ckpt")
    return tmp_path / "HBQ_image_tokenizer_16dim_M4.ckpt"


def sizes():
    return [f"tokenizer.model.{name}={size}" for name, size in SIZES.items()]


def test_a_run(run, caplog):
    with caplog.at_level("INFO"):
        folder = exported(f"ckpt={run}")
    assert folder == run / "export"
    contents = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    sha256 = weights_hash(contents["ema"]["0.99"])
    assert weights_hash(load_file(folder / "model.safetensors")) == sha256
    assert str(folder) in caplog.text
    assert sha256 in caplog.text
    provenance = json.loads((folder / "config.json").read_text())["_provenance"]
    assert provenance == {"source": str(run), "step": 12, "sha256": sha256}
    trained = exported(f"ckpt={run}", f"out={run}/trained", "ema=none")
    expected = {k.removeprefix("network."): v for k, v in contents["state_dict"].items()}
    assert weights_hash(load_file(trained / "model.safetensors")) == weights_hash(expected)


@pytest.mark.parametrize("option", ["official_image", "official_joint"])
def test_an_official_file(official, golden, tmp_path, option):
    folder = exported(f"ckpt={official}", f"tokenizer={option}", *sizes())
    assert folder == tmp_path / "export"
    tensors = golden("tokenizer")
    with torch.no_grad():
        features = HBQTokenizer.from_pretrained(folder).encode(tensors["T5.video"])
    torch.testing.assert_close(features, tensors["T5.features"], atol=1e-4, rtol=0)


def test_through_all_formats_to_the_same_bits(official, tmp_path):
    folder = exported(f"ckpt={official}", "tokenizer=official_image", *sizes(), f"out={tmp_path}/first")
    file = exported(f"ckpt={folder}", "format=official", f"out={tmp_path}/v1.5/theirs")
    assert file == tmp_path / "v1.5" / "theirs.ckpt"
    before, after = (torch.load(path, weights_only=True)["ema"] for path in (official, file))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = exported(f"ckpt={file}", "tokenizer=official_image", *sizes(), f"out={tmp_path}/second")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert load_tokenizer(folder)[1]["sha256"] == load_tokenizer(again)[1]["sha256"]


def test_mistakes(run, official, tmp_path):
    def complaint(*overrides):
        with pytest.raises(UserError) as error:
            exported(*overrides)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "format=onnx: choose among pretrained, official" in complaint(f"ckpt={run}", "format=onnx")
    assert complaint(f"ckpt={tmp_path}/nowhere").startswith("ckpt: no such checkpoint or run folder")
    assert "tokenizer=official_image" in complaint(f"ckpt={official}")
    assert "is of another size" in complaint(
        f"ckpt={official}", "tokenizer=official_image", *sizes(), "tokenizer.model.dim=16"
    )
    assert "holds other files" in complaint(f"ckpt={run}", f"out={tmp_path}")
    assert "is an export already" in complaint(f"ckpt={exported(f'ckpt={run}')}")
    path = run / "checkpoints" / "last.ckpt"
    contents = torch.load(path, weights_only=True)
    contents["config"]["training"]["_target_"] = "grn.training.RefinerModule"
    torch.save(contents, path)
    assert "last.ckpt is a refiner without its tokenizer" in complaint(f"ckpt={run}")
