import json

import pytest
import torch
from torch import nn

from grn.checkpoints.official_class_refiner import CLASS_REFINER_RULES
from grn.networks.class_refiner import ClassRefiner
from grn.runtime.errors import UserError
from grn.weights.mapping import load_strict, rename

SMALL = {
    "channels": 3,
    "classes": 4,
    "num_labels": 5,
    "size": 4,
    "depth": 3,
    "width": 32,
    "heads": 2,
    "bottleneck": 8,
    "context_start": 1,
    "context_tokens": 2,
}
IMAGENET = {"channels": 16, "classes": 16, "num_labels": 1000, "size": 16, "context_tokens": 32}
SIZES = {
    "B": {"depth": 12, "width": 768, "heads": 12, "bottleneck": 128, "context_start": 4},
    "L": {"depth": 24, "width": 1024, "heads": 16, "bottleneck": 128, "context_start": 8},
    "H": {"depth": 32, "width": 1280, "heads": 16, "bottleneck": 256, "context_start": 10},
    "G": {"depth": 40, "width": 1664, "heads": 16, "bottleneck": 256, "context_start": 10},
}


def shaken(**changes):
    """A small network whose parameters are all away from their zeros."""
    torch.manual_seed(0)
    network = ClassRefiner(**SMALL | changes)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def inputs(batch=3):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, (batch, 3, 1, 4, 4), generator=generator)
    return tokens, torch.linspace(0.1, 0.9, batch), torch.arange(batch) % 6


def golden_network(name, tensors, meta):
    network = ClassRefiner(
        channels=meta["in_channels"] // meta["classes"],
        classes=meta["classes"],
        num_labels=meta["num_classes"],
        size=meta["input_size"],
        depth=meta["depth"],
        width=meta["hidden_size"],
        heads=meta["num_heads"],
        bottleneck=meta["bottleneck_dim"],
        context_start=meta["in_context_start"],
        context_tokens=meta["in_context_len"],
        mlp_ratio=meta["mlp_ratio"],
    )
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    torch.testing.assert_close(network.position, state["pos_embed"][0], atol=1e-6, rtol=0)
    load_strict(network, rename(state, CLASS_REFINER_RULES), source=name)
    return network


@pytest.mark.parametrize("name", ["c2i_ind", "c2i_bit"])
def test_golden(name, golden, golden_meta):
    tensors, meta = golden(name), golden_meta[name]
    network = golden_network(name, tensors, meta)
    logits = network(tensors["tokens"].unsqueeze(2), tensors["t"], tensors["labels"])
    assert logits.shape == (3, meta["classes"], tensors["tokens"].shape[1], 1, 8, 8)
    torch.testing.assert_close(logits.squeeze(3), tensors["logits"], atol=1e-5, rtol=0)


def count(depth, width, bottleneck, heads, channels=16, classes=16, **_):
    """Parameters by docs/method.md#class-conditional-refiner, matrix by matrix."""
    hidden, head = int(4 * width * 2 / 3), width // heads
    block = 2 * width + 2 * head  # RMSNorms
    block += width * 3 * width + 3 * width + width * width + width  # attention
    block += width * 2 * hidden + 2 * hidden + hidden * width + width  # SwiGLU
    block += width * 6 * width + 6 * width  # adaLN
    embeddings = channels * classes * bottleneck + bottleneck * width + width + 1001 * width + 32 * width
    time = 256 * width + width + width * width + width
    out = width + width * 2 * width + 2 * width + width * channels * classes + channels * classes
    return depth * block + embeddings + time + out


@pytest.mark.parametrize(
    ("size", "changes", "parameters"),
    [
        ("B", {}, 130_664_448),
        ("L", {}, 458_287_328),
        ("H", {}, 951_727_424),
        ("G", {}, 2_006_146_448),
        ("B", {"channels": 64, "classes": 2}, 130_549_632),
    ],
)
def test_parameter_counts_of_the_reference_sizes(size, changes, parameters):
    with torch.device("meta"):
        network = ClassRefiner(**IMAGENET | SIZES[size] | changes)
    assert sum(p.numel() for p in network.parameters()) == parameters == count(**SIZES[size], **changes)


def test_a_new_network_knows_nothing():
    logits = ClassRefiner(**SMALL)(*inputs())
    assert logits.dtype == torch.float32
    assert (logits == 0).all()


def test_every_input_matters():
    network = shaken()
    tokens, t, labels = inputs()
    base = network(tokens, t, labels)
    other = tokens.clone()
    other[:, 0, 0, 0, 0] = (other[:, 0, 0, 0, 0] + 1) % 4
    assert not torch.allclose(base, network(other, t, labels))
    assert not torch.allclose(base, network(tokens, t + 0.05, labels))
    assert not torch.allclose(base, network(tokens, t, torch.full_like(labels, 5)))
    for row in range(3):  # and rows do not see each other
        alone = network(tokens[row : row + 1], t[row : row + 1], labels[row : row + 1])
        torch.testing.assert_close(alone, base[row : row + 1], atol=1e-5, rtol=1e-4)


def test_gradients_reach_every_parameter():
    network = shaken()
    network(*inputs(6)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_without_context_tokens():
    logits = shaken(context_tokens=0)(*inputs())
    assert logits.shape == (3, 4, 3, 1, 4, 4)


@pytest.mark.filterwarnings("error:Mismatch dtype")  # RMSNorm would fall back to a slow path
@pytest.mark.parametrize("name", ["c2i_ind", "c2i_bit"])
def test_golden_in_bfloat16(name, golden, golden_meta):
    tensors = golden(name)
    network = golden_network(name, tensors, golden_meta[name])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = network(tensors["tokens"].unsqueeze(2), tensors["t"], tensors["labels"])
    assert (logits.squeeze(3) - tensors["logits"]).norm() / tensors["logits"].norm() < 1e-2


def test_compiling_in_place_changes_neither_names_nor_logits():
    network = shaken()
    names, expected = list(network.state_dict()), network(*inputs())
    network.compile(backend="eager", fullgraph=True)  # one graph: nothing in it depends on the values of tensors
    torch.testing.assert_close(network(*inputs()), expected)
    assert list(network.state_dict()) == names


@pytest.mark.filterwarnings("error:Mismatch dtype")  # RMSNorm would fall back to a slow path
def test_under_autocast_the_stream_is_float32_also_where_fsdp_casts_the_weights():
    network, seen = shaken(), set()
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    for block in network.blocks:
        block.register_forward_hook(lambda _, given, made: seen.update((given[0].dtype, made.dtype)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network(torch.zeros(2, 3, 1, 4, 4, dtype=torch.long), torch.tensor([0.1, 0.8]), torch.tensor([2, 5]))
    assert seen == {torch.float32}


@pytest.mark.parametrize("form", ["autocast", "weights"])
def test_the_head_is_float32_in_bfloat16(form):
    """Norm, modulation and linear map of what the last block gave, by formula; nearly no logit is one of a bf16."""
    network, given = shaken(), []
    if form == "weights":
        network.bfloat16()
    network.head.register_forward_pre_hook(lambda _, inputs: given.extend(value.double() for value in inputs))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
        logits = network(*inputs())
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).double().mean() > 0.95
    x, condition = given
    state = {name: value.double() for name, value in network.head.state_dict().items()}
    shift, scale = (condition @ state["modulation.weight"].T + state["modulation.bias"])[:, None].chunk(2, dim=-1)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * state["norm.weight"]
    expected = (x * (1 + scale) + shift) @ state["out.weight"].T + state["out.bias"]
    expected = expected.view(3, 1, 4, 4, 4, 3).permute(0, 4, 5, 1, 2, 3)
    torch.testing.assert_close(logits.double(), expected, atol=2e-6, rtol=2e-6)


def test_bfloat16_autocast_is_close():
    network = shaken()
    exact = network(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(*inputs())
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 1e-2


@torch.no_grad()
def test_float64_all_the_way():
    network = shaken()
    tokens, t, labels = torch.randint(4, (9, 3, 1, 4, 4)), torch.rand(9), torch.arange(9) % 6
    in_float32 = network(tokens, t, labels)
    logits = network.double()(tokens, t, labels)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), in_float32, atol=1e-5, rtol=1e-5)
    alone = torch.cat([network(tokens[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(alone, logits, atol=1e-13, rtol=0)  # nothing was rounded to float32 on the way


def test_meta_construction_then_init_is_a_normal_construction():
    with torch.device("meta"):
        network = ClassRefiner(**SMALL)
    network = network.to_empty(device="cpu")
    torch.manual_seed(0)
    network.init_weights()
    torch.manual_seed(0)
    expected = ClassRefiner(**SMALL)
    expected.init_weights()
    for (name, a), (_, b) in zip(network.named_buffers(), expected.named_buffers()):
        assert torch.equal(a, b), name
    for name, parameter in network.named_parameters():
        assert parameter.isfinite().all(), name
    assert (network(*inputs()) == 0).all()


@pytest.mark.parametrize(
    ("changes", "key"), [({"width": 36}, "model.width"), ({"context_start": 3}, "model.context_start")]
)
def test_sizes_that_do_not_fit_name_their_key(changes, key):
    with pytest.raises(UserError, match=key):
        ClassRefiner(**SMALL | changes)


def test_tokens_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"tokens must be \[B, 3, 1, 4, 4\]"):
        ClassRefiner(**SMALL)(torch.zeros(1, 3, 1, 5, 4, dtype=torch.long), torch.zeros(1), torch.zeros(1).long())


def test_there_and_back(golden, tmp_path):
    """Tables that no file holds are right again, and only what the file holds is ever filled with numbers."""
    tensors = golden("c2i_ind")
    sizes = {"channels": 4, "classes": 8, "num_labels": 10, "size": 8, "depth": 4, "width": 48, "heads": 4}
    network = ClassRefiner(**sizes, bottleneck=16, context_start=2, context_tokens=4)
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    load_strict(network, rename(state, CLASS_REFINER_RULES), source="golden")
    again = ClassRefiner.from_pretrained(network.save_pretrained(tmp_path / "refiner"))
    assert again.config == network.config == sizes | {
        "bottleneck": 16, "context_start": 2, "context_tokens": 4, "mlp_ratio": 4.0,
    }  # fmt: skip
    for (name, buffer), (_, expected) in zip(again.named_buffers(), network.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    assert {name for name, p in again.named_parameters() if p.requires_grad} == set(network.state_dict())
    logits = again(tensors["tokens"].unsqueeze(2), tensors["t"], tensors["labels"])
    assert torch.equal(logits, network(tensors["tokens"].unsqueeze(2), tensors["t"], tensors["labels"]))
    torch.testing.assert_close(logits.squeeze(3), tensors["logits"], atol=1e-4, rtol=0)
    assert torch.equal(ClassRefiner.from_pretrained(tmp_path, subfolder="refiner").sin, network.sin)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"size": 10**6}, "model.size=1000000 must be a whole number, 1 to 128"),
        ({"size": 8.0}, "model.size=8.0 must be a whole number"),
        ({"channels": -3, "classes": -4}, "model.channels=-3 must be a whole number"),
        ({"depth": 10**9}, "far more parameters than the file"),
        ({"width": 2**40}, "is of another size than the model|describes no ClassRefiner"),
        ({"context_tokens": 10**9}, r"context_position is \(2, 32\) in the file, \(1000000000, 32\) in the model"),
        ({"context_start": 1.5}, "model.context_start=1.5 must be a block, 0..2"),
        ({"heads": 0}, "model.heads=0 must be a whole number, at least 1"),
        ({"mlp_ratio": float("inf")}, "describes no ClassRefiner"),
    ],
    ids=str,
)
def test_a_hostile_config_is_one_line(tmp_path, changes, expected):
    folder = ClassRefiner(**SMALL).save_pretrained(tmp_path / "refiner")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=expected) as error:
        ClassRefiner.from_pretrained(folder)
    assert "\n" not in str(error.value)
