import os

import pytest
import torch

from grn.checkpoints.mapping import load_strict
from grn.checkpoints.official_tokenizer import load_official_tokenizer
from grn.errors import UserError
from grn.networks.tokenizer import HBQTokenizer

PREFIX = "state."


@pytest.fixture(scope="module")
def official(golden):
    """Weights by their official names."""
    tensors = golden("tokenizer")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}


def network(**sizes):
    return HBQTokenizer(**{"latent_channels": 4, "dim": 8, "decoder_dim": 8} | sizes)


def saved(path, contents, **options):
    torch.save(contents, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_every_weight_finds_its_place(official, golden, tmp_path, zipped):
    path = saved(tmp_path / "HBQ.ckpt", {"vae": official}, _use_new_zipfile_serialization=zipped)
    state = load_official_tokenizer(path)
    assert len(state) == len(official)
    tokenizer = network()
    load_strict(tokenizer, state, source=str(path))
    tensors = golden("tokenizer")
    with torch.no_grad():
        features = tokenizer.encode(tensors["T1.video"])
    torch.testing.assert_close(features, tensors["T1.features"], atol=1e-4, rtol=0)


def test_averaged_weights_are_preferred(official, tmp_path):
    averaged = {name: tensor + 1 for name, tensor in official.items()}
    path = saved(tmp_path / "both.ckpt", {"vae": official, "ema": averaged})
    name = "encoder.stem.weight"
    assert torch.equal(load_official_tokenizer(path)[name], averaged["encoder.conv1.weight"])
    path = saved(tmp_path / "no_average.ckpt", {"vae": official, "ema": None})
    assert torch.equal(load_official_tokenizer(str(path))[name], official["encoder.conv1.weight"])


def test_one_of_other_sizes(official, tmp_path):
    state = load_official_tokenizer(saved(tmp_path / "HBQ.ckpt", {"ema": official}))
    with pytest.raises(UserError, match=r"HBQ\.ckpt is of another size than the model: .* misfits in all"):
        load_strict(network(latent_channels=8), state, source="HBQ.ckpt")


def test_an_unknown_parameter(official, tmp_path):
    path = saved(tmp_path / "HBQ.ckpt", {"ema": official | {"encoder.middle.3.weight": torch.zeros(1)}})
    with pytest.raises(UserError, match=r"HBQ\.ckpt: parameter 'encoder\.middle\.3\.weight' is not of a known"):
        load_official_tokenizer(path)


def complaint(path):
    with pytest.raises(UserError) as error:
        load_official_tokenizer(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_missing_file(tmp_path):
    assert "no such tokenizer checkpoint" in complaint(tmp_path / "HBQ.ckpt")
    assert "no such tokenizer checkpoint" in complaint(tmp_path)


def test_not_a_checkpoint(tmp_path):
    path = tmp_path / "HBQ.ckpt"
    for content in (b"", b"<html>404</html>", b"PK\x03\x04 cut off"):
        path.write_bytes(content)
        assert "cannot be read as a tokenizer checkpoint" in complaint(path)


def test_truncated(official, tmp_path):
    path = saved(tmp_path / "HBQ.ckpt", {"ema": official})
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cannot be read as a tokenizer checkpoint" in complaint(path)


@pytest.mark.parametrize(
    "contents",
    [{"model": {}}, {"ema": {}}, {"ema": None}, {"ema": torch.ones(3)}, [1, 2], torch.ones(2)],
    ids=["other", "empty", "none", "tensor", "list", "bare"],
)
def test_neither_key(contents, tmp_path):
    assert "neither `ema` nor `vae`" in complaint(saved(tmp_path / "HBQ.ckpt", contents))


def test_weights_that_are_none(tmp_path):
    assert "not all named tensors" in complaint(saved(tmp_path / "HBQ.ckpt", {"ema": {"conv1.weight": 3}}))


class Payload:
    """Unpickled without restraint, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_not_executed(official, tmp_path, zipped):
    trace = tmp_path / "executed"
    contents = {"ema": official, "payload": Payload(str(trace))}
    path = saved(tmp_path / "HBQ.ckpt", contents, _use_new_zipfile_serialization=zipped)
    assert "cannot be read as a tokenizer checkpoint" in complaint(path)
    assert not trace.exists()


def test_a_gain_that_claims_to_be_huge_is_never_made(official, tmp_path):
    huge = torch.zeros(1).expand(8, 10**6, 10**6, 1)  # 32 TB of one stored number
    state = load_official_tokenizer(saved(tmp_path / "HBQ.ckpt", {"ema": official | {"decoder.head.0.gamma": huge}}))
    with pytest.raises(UserError, match="another size"):
        load_strict(network(), state, source="HBQ.ckpt")
