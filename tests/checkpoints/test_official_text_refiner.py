import pytest
import torch
from hydra import compose, initialize_config_dir

from grn.checkpoints.native import build_network
from grn.checkpoints.official_text_refiner import (
    check_attention,
    load_official_text_refiner,
    official_state,
    our_state,
    save_official_text_refiner,
)
from grn.networks.text_refiner import TextRefiner
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.training.building import _initial_weights
from grn.weights.mapping import load_strict


@pytest.fixture
def state(golden):
    """As a file has it."""
    return {k.removeprefix("state."): v for k, v in golden("text_bit").items() if k.startswith("state.")}


def network():
    return TextRefiner(channels=12, classes=2, depth=4, width=64, heads=4, attention="one_way", text_width=24)


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


def test_a_training_file_holds_the_weights_and_their_average(state, tmp_path):
    """{args, ..., trainer: {gpt_fsdp, gpt_ema_fsdp}}: the authors sample the first."""
    average = {name: tensor + 1 for name, tensor in state.items()}
    trainer = {"gpt_fsdp": state, "gpt_ema_fsdp": average}
    torch.save({"args": {"lr": 1e-4}, "epoch": 3, "g_it": 7, "trainer": trainer}, tmp_path / "x.pth")
    ours = load_official_text_refiner(tmp_path / "x.pth")
    assert torch.equal(ours["head.out.bias"], state["head.proj.bias"])
    weights, averages = _initial_weights(network(), str(tmp_path / "x.pth"))
    assert torch.equal(weights["head.out.bias"], state["head.proj.bias"])
    assert averages.keys() == {"0.999"}
    assert torch.equal(averages["0.999"]["head.out.bias"], average["head.proj.bias"])
    torch.save({"trainer": {"gpt_ema_fsdp": average}}, tmp_path / "y.pth")
    with pytest.raises(UserError, match="not an official text refiner"):
        load_official_text_refiner(tmp_path / "y.pth")


@pytest.mark.parametrize(
    ("name", "trained"),
    [("GRN_T2I_2B", "one_way"), ("GRN_T2V_2B", "one_way"), ("GRN_T2I_2B_FSA_251600", "full"), ("mine_FSA", "full")],
)
def test_a_file_name_tells_the_attention(name, trained, state, tmp_path, caplog):
    ours = our_state(state, source="golden")
    check_attention(ours, trained, tmp_path / f"{name}.pth", key="model.weights")
    assert not caplog.records
    other = {"full": "one_way", "one_way": "full"}[trained]
    with pytest.raises(
        UserError, match=rf"model\.weights=.*{name}\.pth has {trained} attention.*model\.attention={trained}"
    ):
        check_attention(ours, other, tmp_path / f"{name}.pth", key="model.weights")


def test_attention_that_a_file_does_not_tell(state, caplog):
    ours = our_state(state, source="golden")
    check_attention(ours, "one_way", "renamed.pth", key="ckpt")
    assert "ckpt=renamed.pth does not tell its attention: taken as model.attention=one_way" in caplog.text
    wide = ours | {"head.norm.weight": torch.ones(4096)}
    check_attention(wide, "full", "renamed.pth", key="ckpt")
    with pytest.raises(UserError, match="has full attention, the model one_way"):
        check_attention(wide, "one_way", "renamed.pth", key="ckpt")


def test_ten_and_more_blocks_keep_their_order():
    """By number, not by name; a last chunk may have fewer."""
    places = [(chunk, number) for chunk in range(11) for number in range(12)][:-5]
    official = {
        f"block_chunks.{chunk}.module.{number}.input_layernorm.weight": torch.tensor([chunk, number])
        for chunk, number in sorted(places, key=str)
    }
    ours = our_state(official, source="x")
    assert [tuple(ours[f"blocks.{i}.norm1.weight"].tolist()) for i in range(len(places))] == places


def official_shapes(*, depth, chunks, width, heads, hidden, kv=None, inputs=512, text=4096):
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
        shapes |= {f"{prefix}.attn.{name}_proj.weight": (width, width) for name in "qo"}
        shapes |= {f"{prefix}.attn.{name}_proj.weight": (kv or width, width) for name in "kv"}
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
        ("8B", {"depth": 36, "chunks": 6, "width": 4096, "heads": 32, "hidden": 12288}),
        ("8B_grouped", {"depth": 36, "chunks": 6, "width": 4096, "heads": 32, "hidden": 16384, "kv": 1024}),
        ("tiny", {"depth": 4, "chunks": 2, "width": 512, "heads": 4, "hidden": 1792}),
    ],
)
def test_the_authors_refiners_at_full_size(size, sizes):
    """2B, both definitions of 8B and a tiny one, without their weights: all names and shapes, both ways."""
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
    mine = TextRefiner(
        channels=12, classes=2, depth=4, width=64, heads=4, attention="one_way", kv_heads=2, text_width=24
    )
    with pytest.raises(UserError, match=r"attention\.k\.weight is \(64, 64\) in the file, \(32, 64\) in the model"):
        load_strict(mine, our_state(state, source="golden"), source="golden")
