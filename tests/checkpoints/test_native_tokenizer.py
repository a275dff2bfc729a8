"""A refiner's tokenizer from a checkpoint or an exported folder: the same weights, the same record."""

import json

import pytest
import torch

from grn.checkpoints.native import build_network, load_tokenizer, restore_tokenizer, weights_hash
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError

MODEL = {
    "_target_": "grn.networks.tokenizer.HBQTokenizer",
    "weights": None,
    "latent_channels": 2,
    "dim": 4,
    "decoder_dim": 4,
    "multipliers": [1, 2],
    "temporal": [False],
    "blocks_per_stage": 1,
}


def weights(seed):
    torch.manual_seed(seed)
    return build_network(MODEL).state_dict()


@pytest.fixture
def checkpoint(tmp_path):
    """A run folder of a tokenizer: trained weights of seed 0, averages of seed 1."""
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    path.parent.mkdir(parents=True)
    contents = {
        "state_dict": {f"network.{name}": tensor for name, tensor in weights(0).items()},
        "config": {"training": {"_target_": "grn.training.TokenizerModule"}, "model": MODEL},
        "global_step": 12,
        "ema": {"0.99": weights(1)},
        "ema_use": 0.99,
    }
    torch.save(contents, path)
    return tmp_path / "run"


@pytest.fixture
def folder(checkpoint, tmp_path):
    tokenizer, record = load_tokenizer(checkpoint)
    return tokenizer.save_pretrained(tmp_path / "export", provenance={"step": record["step"]})


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_checkpoint_and_export_have_one_record(checkpoint, folder):
    tokenizer, record = load_tokenizer(checkpoint)
    exported, again = load_tokenizer(str(folder))
    assert isinstance(exported, HBQTokenizer)
    assert same(tokenizer.state_dict(), weights(1))
    assert same(exported.state_dict(), weights(1))
    assert same(again["state_dict"], record["state_dict"])
    assert again["path"] == str(folder)
    assert record["path"] == str(checkpoint / "checkpoints" / "best.ckpt")
    for key in ("sha256", "step", "official"):
        assert again[key] == record[key], key
    assert record["sha256"] == weights_hash(weights(1))
    assert (record["step"], record["official"]) == (12, False)
    assert same(restore_tokenizer(again | {"state_dict": record["state_dict"]}).state_dict(), weights(1))


def test_which_average(checkpoint, folder):
    assert same(load_tokenizer(checkpoint, ema="none")[0].state_dict(), weights(0))
    with pytest.raises(UserError, match=r"ema=0\.5 is not in .* it holds 0\.99"):
        load_tokenizer(checkpoint, ema=0.5)
    with pytest.raises(UserError, match=r"ema=0\.99: .*export holds one set of weights; leave ema out"):
        load_tokenizer(folder, ema=0.99)


@pytest.mark.parametrize("embed", [True, False])
def test_a_refiner_finds_its_exported_tokenizer_again(folder, embed):
    tokenizer, record = load_tokenizer(folder, embed=embed)
    assert (record["state_dict"] is not None) == embed
    torch.save(record, folder.parent / "record.pt")  # as in a refiner's checkpoint
    record = torch.load(folder.parent / "record.pt", weights_only=True)
    assert same(restore_tokenizer(record).state_dict(), tokenizer.state_dict())
    if embed:
        return
    torch.nn.init.ones_(tokenizer.decoder.head.conv.bias)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"export is not the one this refiner was trained with \(its weights changed\)"):
        restore_tokenizer(record)


def test_an_older_record_without_a_step(folder):
    _, record = load_tokenizer(folder)
    del record["step"]
    assert same(restore_tokenizer(record).state_dict(), weights(1))


def test_errors_name_the_key(checkpoint, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def complaint(path, **options):
        with pytest.raises(UserError) as error:
            load_tokenizer(path, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert complaint("run/nothing").startswith("tokenizer.ckpt: no such checkpoint or run folder: run/nothing")
    assert complaint("hf://grn-tests/nothing", key="ckpt").startswith("ckpt: grn-tests/nothing: not here, and the Hub")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dim": 8}))
    assert complaint(folder).startswith(f"tokenizer.ckpt: {folder}/model.safetensors is of another size than the model")
    path = checkpoint / "checkpoints" / "best.ckpt"
    contents = torch.load(path, weights_only=True)
    contents["config"]["training"]["_target_"] = "grn.training.RefinerModule"
    torch.save(contents, path)
    assert "best.ckpt is a refiner, not a tokenizer" in complaint(checkpoint)


@pytest.mark.parametrize("step", ["12", [1], None])
def test_a_step_that_is_none(folder, step):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_provenance": {"step": step}}))
    assert load_tokenizer(folder)[1]["step"] is None
