import pytest
import torch
from hydra import compose, initialize_config_dir

from grn.checkpoints.mapping import load_strict
from grn.checkpoints.native import build_network
from grn.checkpoints.official_text_refiner import (
    load_official_text_refiner,
    official_state,
    our_state,
    save_official_text_refiner,
)
from grn.cli import CONF
from grn.errors import UserError
from grn.modules import _initial_weights
from grn.networks.text_refiner import TextRefiner


@pytest.fixture
def state(golden):
    """As a file has it."""
    return {k.removeprefix("state."): v for k, v in golden("text_bit").items() if k.startswith("state.")}


def network():
    return TextRefiner(channels=12, classes=2, depth=4, width=64, heads=4, text_width=24)


def test_there_and_back(state, tmp_path):
    torch.save(state, tmp_path / "GRN_T2I_2B.pth")
    ours = load_official_text_refiner(tmp_path / "GRN_T2I_2B.pth")
    mine = network()
    load_strict(mine, ours, source="golden")
    assert torch.equal(mine.blocks[2].mlp.value.weight, state["block_chunks.1.module.0.mlp.up_proj.weight"])
    path = save_official_text_refiner(mine.state_dict(), tmp_path / "again.pth", chunks=2)
    again = torch.load(path, weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    weights, averages = _initial_weights(network(), str(path))  # model.weights=...
    assert averages == {}
    assert all(torch.equal(weights[name], ours[name]) for name in ours)


def test_ten_and_more_blocks_keep_their_order():
    """By number, not by name; a last chunk may have fewer."""
    places = [(chunk, number) for chunk in range(11) for number in range(12)][:-5]
    official = {
        f"block_chunks.{chunk}.module.{number}.input_layernorm.weight": torch.tensor([chunk, number])
        for chunk, number in sorted(places, key=str)
    }
    ours = our_state(official, source="x")
    assert [tuple(ours[f"blocks.{i}.norm1.weight"].tolist()) for i in range(len(places))] == places


def official_shapes(*, depth, chunks, width, heads, hidden, inputs=512, text=4096):
    """Name -> shape of the authors' text refiners."""
    shapes = {
        "word_embed.weight": (width, inputs),
        "word_embed.bias": (width,),
        "pt_embedder.mlp.0.weight": (width, 256),
        "pt_embedder.mlp.0.bias": (width,),
        "pt_embedder.mlp.2.weight": (width, width),
        "pt_embedder.mlp.2.bias": (width,),
        "text_proj.weight": (width, text),
        "text_proj.bias": (width,),
        "head.norm.weight": (width,),
        "head.proj.weight": (inputs, width),
        "head.proj.bias": (inputs,),
    }
    for block in range(depth):
        prefix = f"block_chunks.{block // (depth // chunks)}.module.{block % (depth // chunks)}"
        shapes |= {f"{prefix}.{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{prefix}.attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{prefix}.attn.{name}_norm.weight": (width // heads,) for name in "qk"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (width, hidden)}
    return shapes


def shapes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_the_list_of_names_and_shapes_is_that_of_the_golden_file(state, golden_meta):
    assert len(state) == golden_meta["text_bit"]["state_keys"]
    assert shapes_of(state) == official_shapes(depth=4, chunks=2, width=64, heads=4, hidden=256, inputs=24, text=24)


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ("2B", {"depth": 28, "chunks": 7, "width": 2304, "heads": 18, "hidden": 8192}),
        ("tiny", {"depth": 4, "chunks": 2, "width": 512, "heads": 4, "hidden": 1792}),
    ],
)
def test_the_authors_refiners_at_full_size(size, sizes):
    """GRN_T2I_2B and a tiny one, without their weights: all names and shapes, both ways."""
    with initialize_config_dir(str(CONF), version_base="1.3"), torch.device("meta"):
        mine = build_network(compose("train", [f"model=text_refiner_{size}", "tokenizer.ckpt=x"]).model)
        official = {name: torch.empty(shape) for name, shape in official_shapes(**sizes).items()}
    load_strict(mine, our_state(official, source="x"), source="x")
    assert shapes_of(official_state(mine.state_dict(), chunks=sizes["chunks"])) == shapes_of(official)


def test_blocks_that_make_no_even_chunks():
    with pytest.raises(UserError, match=r"model\.depth=4 has no official names in 7 chunks"):
        official_state(network().state_dict())


def test_hostile_and_foreign_files_are_refused(state, tmp_path):
    contents = {
        "unknown": ({"surprise": torch.zeros(1)}, "'surprise'"),
        "far": ({"block_chunks.99999.module.0.attn.q_proj.weight": torch.zeros(1)}, "not of a known official"),
        "twice": (state | {"blocks.0.input_layernorm.weight": torch.zeros(64)}, "two of its names mean the same"),
        "nested": ({"model": state}, "not an official text refiner"),
        "empty": ({}, "not an official text refiner"),
        "whole numbers": ({"word_embed.weight": torch.zeros(3, dtype=torch.int8)}, "not an official text refiner"),
        "list": ([torch.zeros(1)], "not an official text refiner"),
    }
    for name, (content, words) in contents.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=words) as error:
            load_official_text_refiner(tmp_path / f"{name}.pth")
        assert "\n" not in str(error.value)
    (tmp_path / "noise.pth").write_bytes(b"noise")
    with pytest.raises(UserError, match=r"model\.weights: .*noise\.pth cannot be read as a checkpoint"):
        load_official_text_refiner(tmp_path / "noise.pth")
    with pytest.raises(UserError, match=r"ckpt: no file .*missing\.pth"):
        load_official_text_refiner(tmp_path / "missing.pth", key="ckpt")


def test_another_size_is_one_line(state):
    mine = TextRefiner(channels=12, classes=2, depth=4, width=64, heads=4, kv_heads=2, text_width=24)
    with pytest.raises(UserError, match=r"attention\.k\.weight is \(64, 64\) in the file, \(32, 64\) in the model"):
        load_strict(mine, our_state(state, source="golden"), source="golden")
