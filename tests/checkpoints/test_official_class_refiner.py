import pickle
from math import prod

import pytest
import torch
from hydra import compose, initialize_config_dir

from grn.checkpoints.native import build_network
from grn.checkpoints.official_class_refiner import (
    CLASS_REFINER_RULES,
    load_official_class_refiner,
    official_state,
    save_official_class_refiner,
)
from grn.networks.class_refiner import ClassRefiner
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.weights.mapping import load_strict, rename


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
    states = {part: {} for part in states}
    no_weights = []
    for i, state in enumerate([3, {7: torch.zeros(1)}, {"net.x": [1]}, {"net.x": torch.zeros(1, dtype=torch.int8)}]):
        no_weights.append(tmp_path / f"no_weights{i}.pth")
        torch.save(states | {"model_ema2": state}, no_weights[-1])
    for path, words in [
        (hostile, "cannot be read"),
        (old, "cannot be read"),
        (foreign, "not an official"),
        (unknown, "'surprise'"),
        *((path, "not all is named weights") for path in no_weights),
        (tmp_path / "missing.pth", "no file"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            load_official_class_refiner(path)
        assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x_embedder.proj1.weight", "x_embedder.proj2.weight", "in_context_posemb"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 10**6, 10**6, 10**6)], ids=str)
def test_a_tensor_of_any_shape_is_a_misfit_at_most(official, name, shape):
    contents = torch.load(official, weights_only=True)
    contents["model"]["net." + name] = torch.zeros(1).expand(shape) if shape else torch.zeros(())
    torch.save(contents, official)
    network = ClassRefiner(
        channels=4, classes=8, num_labels=10, size=8, depth=4, width=48, heads=4, bottleneck=16,
        context_start=2, context_tokens=4,
    )  # fmt: skip
    with pytest.raises(UserError, match="another size"):
        load_strict(network, load_official_class_refiner(official)["model"], source="hostile")


def linear(name, out, into, *, bias=True):
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def official_shapes(*, tokens, labels, size, depth, width, heads, bottleneck, context):
    """Name -> shape of the authors' class-conditional refiners; `tokens` is classes * channels."""
    hidden = int(4 * width * 2 / 3)
    shapes = {"pos_embed": (1, size * size, width), "in_context_posemb": (1, context, width)}
    shapes |= {"x_embedder.proj1.weight": (bottleneck, tokens, 1, 1)}
    shapes |= {"x_embedder.proj2.weight": (width, bottleneck, 1, 1), "x_embedder.proj2.bias": (width,)}
    shapes |= linear("t_embedder.mlp.0", width, 256) | linear("t_embedder.mlp.2", width, width)
    shapes |= {"y_embedder.embedding_table.weight": (labels + 1, width)}
    for block in (f"blocks.{i}" for i in range(depth)):
        shapes |= {f"{block}.norm1.weight": (width,), f"{block}.norm2.weight": (width,)}
        shapes |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        shapes |= {f"{block}.attn.{name}.weight": (width // heads,) for name in ("q_norm", "k_norm")}
        shapes |= linear(f"{block}.mlp.w12", 2 * hidden, width) | linear(f"{block}.mlp.w3", width, hidden)
        shapes |= linear(f"{block}.adaLN_modulation.1", 6 * width, width)
    shapes |= {"final_layer.norm_final.weight": (width,)} | linear("final_layer.linear", tokens, width)
    return shapes | linear("final_layer.adaLN_modulation.1", 2 * width, width)


def shapes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("name", ["c2i_ind", "c2i_bit"])
def test_the_list_of_names_and_shapes_is_that_of_the_golden_file(golden, golden_meta, name):
    state = {k.removeprefix("state."): v for k, v in golden(name).items() if k.startswith("state.")}
    meta = golden_meta[name]
    assert shapes_of(state) == official_shapes(
        tokens=meta["in_channels"], labels=meta["num_classes"], size=meta["input_size"], depth=meta["depth"],
        width=meta["hidden_size"], heads=meta["num_heads"], bottleneck=meta["bottleneck_dim"],
        context=meta["in_context_len"],
    )  # fmt: skip


SIZES = {  # docs/method.md#class-conditional-refiner
    "B": {"depth": 12, "width": 768, "heads": 12, "bottleneck": 128},
    "L": {"depth": 24, "width": 1024, "heads": 16, "bottleneck": 128},
    "H": {"depth": 32, "width": 1280, "heads": 16, "bottleneck": 256},
    "G": {"depth": 40, "width": 1664, "heads": 16, "bottleneck": 256},
}


@pytest.mark.parametrize("size", SIZES)
def test_the_authors_refiners_at_full_size(size):
    """GRN_ind_B_ep599 and its larger ones, without their weights: all names and shapes, both ways."""
    shapes = official_shapes(tokens=16 * 16, labels=1000, size=16, context=32, **SIZES[size])
    if size == "B":
        assert (len(shapes), sum(map(prod, shapes.values()))) == (15 + 14 * 12, 130_664_448 + 256 * 768)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        model = compose("train", [f"model=class_refiner_{size}", "tokenizer.ckpt=x"]).model
    with torch.device("meta"):
        network = build_network(model)
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    ours = rename(state, CLASS_REFINER_RULES)
    assert len(ours) == len(state) - 1  # pos_embed, a table
    load_strict(network, ours, source=size)
    again = official_state(network.state_dict(), network.position)
    assert shapes_of(again) == {f"net.{name}": shape for name, shape in shapes.items()}


def test_written_files_are_the_authors_to_the_bit(official, tmp_path):
    loaded = load_official_class_refiner(official)
    network = ClassRefiner(
        channels=4, classes=8, num_labels=10, size=8, depth=4, width=48, heads=4, bottleneck=16,
        context_start=2, context_tokens=4,
    )  # fmt: skip
    paths = [
        save_official_class_refiner(loaded["model"], loaded["ema"], network.position, tmp_path / name / "GRN.pth")
        for name in ("a", "b")
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    before, after = (torch.load(path, weights_only=True) for path in (official, paths[0]))
    assert after.keys() == {"model", "model_ema1", "model_ema2"}
    for part, state in after.items():
        assert state.keys() == before[part].keys()
        for name, tensor in state.items():
            if name == "net.pos_embed":
                torch.testing.assert_close(tensor, before["model"][name], atol=1e-6, rtol=0)
            else:
                assert torch.equal(tensor, before[part][name]), name
                assert tensor.is_contiguous()
