"""What `grn info` tells of checkpoints of every kind."""

import json
from pathlib import Path

import pytest
import torch
from test_pipeline import CLASSES, write_run

from grn.checkpoints.summary import show, summary
from grn.networks.class_refiner import ClassRefiner
from grn.runtime.errors import UserError

CRITTERS = Path(__file__).parents[2] / "experiments" / "critters" / "model"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), CLASSES)


def test_a_run_is_its_last_checkpoint(run):
    found = summary(run)
    assert found["what"] == "checkpoint of a run (refiner)"
    assert found["path"] == str(run / "checkpoints" / "last.ckpt")
    assert found["step"] == 12
    assert found["network"]["class"] == "ClassRefiner"
    assert (found["network"]["width"], found["network"]["num_labels"]) == (32, 5)
    contents = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert found["parameters"] == sum(tensor.numel() for tensor in contents["state_dict"].values())
    assert found["tokenizer"]["path"] == str(run / "tokenizer")
    assert found["sampler"]["schedule"].startswith("EntropyGuided(")
    assert found == summary(run / "checkpoints" / "last.ckpt")


def test_an_export_tells_its_parts():
    found = summary(CRITTERS)
    assert found["what"] == "exported refiner"
    assert (found["refiner"]["class"], found["refiner"]["attention"]) == ("TextRefiner", "one_way")
    assert found["refiner"]["dtype"] == "BF16"
    assert found["refiner"]["parameters"] == 1_482_912
    assert found["sampler"]["schedule"] == "Linear(steps=20)"
    network = summary(CRITTERS / "tokenizer")
    assert network["what"] == "exported network"
    assert network["parameters"] == found["tokenizer"]["parameters"]


def official_files():
    tensors = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    yield "class refiner", {"model": tensors, "model_ema1": tensors, "model_ema2": tensors}
    yield "tokenizer", {"ema": tensors}
    yield "text refiner", {"block_chunks.0.module.0.x": torch.zeros(7)}


@pytest.mark.parametrize(("kind", "contents"), official_files())
def test_the_authors_files_are_known(tmp_path, kind, contents):
    torch.save(contents, tmp_path / "file.pth")
    found = summary(tmp_path / "file.pth")
    assert found["what"] == f"the authors' {kind}"
    assert found["parameters"] == 7
    assert found["dtype"] == "float32"


def test_it_is_printed(run, capsys):
    show(str(run), as_json=True)
    assert json.loads(capsys.readouterr().out) == summary(run)
    show(str(CRITTERS), as_json=False)
    assert "1482912" in capsys.readouterr().out.replace("\n", "")


def test_what_is_no_checkpoint_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^ckpt: no such checkpoint or run folder: .*nowhere"):
        summary(tmp_path / "nowhere")
    torch.save({"x": torch.zeros(2)}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=r"^ckpt: .*foreign\.pth is not a checkpoint of GRN"):
        summary(tmp_path / "foreign.pth")
    (tmp_path / "damaged.ckpt").write_bytes(b"PK damaged")
    with pytest.raises(UserError, match=r"^ckpt: .*damaged\.ckpt cannot be read as a checkpoint"):
        summary(tmp_path / "damaged.ckpt")
    folder = ClassRefiner(size=4, channels=3, classes=4, num_labels=5, depth=1, width=32, heads=2, bottleneck=8,
                          context_start=0, context_tokens=1).save_pretrained(tmp_path / "export")  # fmt: skip
    (folder / "model.safetensors").write_bytes(b"damaged!")
    with pytest.raises(UserError, match=r"cannot be read as safetensors"):
        summary(folder)
