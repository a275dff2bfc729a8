import os
from math import prod

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from grn.checkpoints.official_tokenizer import (
    TOKENIZER_RULES,
    load_official_tokenizer,
    official_state,
    save_official_tokenizer,
)
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.training.building import module_from_config
from grn.weights.mapping import load_strict, rename

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


def convolution(name, out, into, *kernel):
    return {f"{name}.weight": (out, into, *kernel), f"{name}.bias": (out,)}


def residual(name, into, out):
    shapes = {f"{name}.residual.0.gamma": (into, 1, 1, 1), f"{name}.residual.3.gamma": (out, 1, 1, 1)}
    shapes |= convolution(f"{name}.residual.2", out, into, 3, 3, 3)
    shapes |= convolution(f"{name}.residual.6", out, out, 3, 3, 3)
    return shapes if into == out else shapes | convolution(f"{name}.shortcut", out, into, 1, 1, 1)


def middle(name, width):
    shapes = {f"{name}.1.norm.gamma": (width, 1, 1)}
    shapes |= convolution(f"{name}.1.to_qkv", 3 * width, width, 1, 1) | convolution(
        f"{name}.1.proj", width, width, 1, 1
    )
    return shapes | residual(f"{name}.0", width, width) | residual(f"{name}.2", width, width)


def official_shapes(dim, dec_dim, z):
    """Name -> shape of the authors' tokenizers: four stages, two residual blocks each, stages 2 and 3 halving time."""
    shapes = convolution("conv1", 2 * z, 2 * z, 1, 1, 1) | convolution("conv2", z, z, 1, 1, 1)
    shapes |= convolution("encoder.conv1", dim, 12, 3, 3, 3)
    for i, (into, out) in enumerate([(1, 1), (1, 2), (2, 4), (4, 4)]):
        stage, into, out = f"encoder.downsamples.{i}.downsamples", into * dim, out * dim
        shapes |= residual(f"{stage}.0", into, out) | residual(f"{stage}.1", out, out)
        shapes |= convolution(f"{stage}.2.resample.1", out, out, 3, 3) if i < 3 else {}
        shapes |= convolution(f"{stage}.2.time_conv", out, out, 3, 1, 1) if i in (1, 2) else {}
    shapes |= middle("encoder.middle", 4 * dim)
    shapes |= {"encoder.head.0.gamma": (4 * dim, 1, 1, 1)} | convolution("encoder.head.2", 2 * z, 4 * dim, 3, 3, 3)
    shapes |= convolution("decoder.conv1", 4 * dec_dim, z, 3, 3, 3)
    shapes |= middle("decoder.middle", 4 * dec_dim)
    for i, (into, out) in enumerate([(4, 4), (4, 4), (4, 2), (2, 1)]):
        stage, into, out = f"decoder.upsamples.{i}.upsamples", into * dec_dim, out * dec_dim
        shapes |= (
            residual(f"{stage}.0", into, out) | residual(f"{stage}.1", out, out) | residual(f"{stage}.2", out, out)
        )
        shapes |= convolution(f"{stage}.3.resample.1", out, out, 3, 3) if i < 3 else {}
        shapes |= convolution(f"{stage}.3.time_conv", 2 * out, out, 3, 1, 1) if i in (0, 1) else {}
    return shapes | {"decoder.head.0.gamma": (dec_dim, 1, 1, 1)} | convolution("decoder.head.2", 12, dec_dim, 3, 3, 3)


def shapes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_the_list_of_names_and_shapes_is_that_of_the_golden_file(official):
    assert official_shapes(8, 8, 4) == shapes_of(official)


@pytest.mark.parametrize(
    ("option", "z", "parameters"), [("official_image", 16, 702_687_612), ("official_joint", 64, 705_693_036)]
)
def test_the_authors_tokenizers_at_full_size(option, z, parameters):
    """HBQ_image_tokenizer_16dim_M4, HBQ_tokenizer_64dim_M4, without their weights: all names and shapes, both ways."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        model = compose("export", [f"tokenizer={option}", "ckpt=x"]).tokenizer.model
    shapes = official_shapes(160, 256, z)
    assert sum(map(prod, shapes.values())) == parameters
    with torch.device("meta"):
        tokenizer = instantiate({name: value for name, value in model.items() if name != "weights"})
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    assert (tokenizer.latent_channels, tokenizer.rounds, tokenizer.stride, tokenizer.temporal_stride) == (z, 4, 16, 4)
    ours = rename(state, TOKENIZER_RULES)
    assert len(ours) == len(state)
    load_strict(tokenizer, ours, source=option)
    assert shapes_of(official_state(tokenizer.state_dict())) == shapes


@pytest.mark.parametrize("blocks", [1, 3])
def test_other_numbers_of_blocks_go_both_ways(blocks):
    state = network(blocks_per_stage=blocks).state_dict()
    theirs = official_state(state)
    assert f"encoder.downsamples.0.downsamples.{blocks}.resample.1.weight" in theirs
    assert f"decoder.upsamples.0.upsamples.{blocks + 1}.time_conv.weight" in theirs
    again = rename(theirs, TOKENIZER_RULES)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_written_files_are_the_authors_to_the_bit(official, tmp_path):
    tokenizer = network()
    load_strict(tokenizer, load_official_tokenizer(saved(tmp_path / "HBQ.ckpt", {"ema": official})), source="HBQ")
    path = save_official_tokenizer(tokenizer.state_dict(), tmp_path / "new" / "written.ckpt")
    contents = torch.load(path, weights_only=True)
    assert contents.keys() == {"ema"}
    assert contents["ema"].keys() == official.keys()
    for name, tensor in official.items():
        assert torch.equal(contents["ema"][name], tensor)
        assert contents["ema"][name].shape == tensor.shape
        assert contents["ema"][name].is_contiguous()
    again = load_official_tokenizer(path)
    assert all(torch.equal(again[name], tensor) for name, tensor in tokenizer.state_dict().items())


def test_official_weights_start_a_run(official, tmp_path):
    path = saved(tmp_path / "HBQ.ckpt", {"ema": official})
    sizes = ["model=tokenizer", "model.latent_channels=4", "model.dim=8", "model.decoder_dim=8"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["+experiment=digits_tokenizer", *sizes, f"model.weights={path}"])
    state = module_from_config(config).network.state_dict()
    assert shapes_of(official_state(state)) == shapes_of(official)
    assert torch.equal(state["encoder.stem.weight"], official["encoder.conv1.weight"])
    config.model.weights = str(tmp_path / "nothing.ckpt")
    with pytest.raises(UserError, match=r"nothing\.ckpt"):
        module_from_config(config)
