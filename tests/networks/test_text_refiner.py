import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from grn.checkpoints.native import build_network
from grn.checkpoints.official_text_refiner import our_state
from grn.method.resolutions import BUDGETS, RESOLUTIONS
from grn.networks import attention
from grn.networks.rotary import rotary_3d
from grn.networks.text_refiner import FIRST_FRAME, TextRefiner, time_positions, visual_positions
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.weights.mapping import load_strict

SMALL = {
    "channels": 3,
    "classes": 4,
    "depth": 3,
    "width": 48,
    "heads": 4,
    "attention": "one_way",
    "kv_heads": 2,
    "mlp_ratio": 5.0,
    "text_width": 10,
    "max_text": 16,
}
SHAPES = [(1, 4, 4), (3, 2, 5), (1, 6, 2), (2, 3, 3)]
TEXT_LENGTHS = [5, 1, 16, 7]


both = pytest.mark.parametrize("scheme", ["one_way", "full"])


def shaken(**changes):
    """A small network whose parameters are all away from their zeros."""
    torch.manual_seed(0)
    network = TextRefiner(**SMALL | changes)
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return network


def samples(shapes=SHAPES, lengths=TEXT_LENGTHS, classes=4):
    """(tokens, t, text, lengths) as `forward` takes them."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(classes, (3, *shape), generator=generator) for shape in shapes]
    text = torch.randn(sum(lengths), 10, generator=generator)
    return tokens, torch.linspace(0.1, 0.9, len(shapes)), text, list(lengths)


def one_by_one(network, tokens, t, text, lengths, **options):
    texts = text.split(lengths)
    return [network([tokens[i]], t[i : i + 1], texts[i], [lengths[i]], **options)[0] for i in range(len(tokens))]


def golden_network(tensors, meta, *, prefix="state.", **changes):
    network = TextRefiner(
        channels=meta["latent_dim"] * meta["hbq_round"],
        classes=2,
        depth=meta["depth"],
        width=meta["embed_dim"],
        heads=meta["num_heads"],
        mlp_ratio=meta["mlp_ratio"],
        text_width=meta["text_channels"],
        **changes,
    )
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    load_strict(network, our_state(state, source="golden"), source="golden")
    return network


@pytest.fixture
def reference(golden, golden_meta):
    """(The golden network, its tensors)."""
    tensors = golden("text_bit")
    return golden_network(tensors, golden_meta["text_bit"], attention="one_way"), tensors


def as_ours(logits, frames, height, width):
    """[1, T*H*W, D, 2] -> [2, D, T, H, W]."""
    return logits.view(frames, height, width, 12, 2).permute(4, 3, 0, 1, 2)


@pytest.mark.parametrize("case", ["image", "video"])
def test_golden_logits_in_both_forms(case, reference):
    network, tensors = reference
    tokens, t, text = (tensors[f"{case}.{name}"] for name in ("tokens", "t", "text"))
    expected = as_ours(tensors[f"{case}.logits"], *tokens.shape[2:])
    packed = network([tokens[0]], t, text, [len(text)])
    torch.testing.assert_close(packed[0], expected, atol=1e-5, rtol=0)
    dense = network.predict(tokens, t, network.text_cache(text, [len(text)]))
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("case", "group", "kv_heads"),
    [
        ("image", "", 4),
        ("video", "", 4),
        ("video_i2v", "", 4),
        ("video", "grouped.", 2),
        ("video_i2v", "grouped.", 2),
    ],
)
def test_golden_logits_of_full_attention(case, group, kv_heads, golden, golden_meta):
    """Of both guidance branches, one by one, as a dense batch of both, and of image to video with its first frame."""
    tensors, meta = golden("text_full"), golden_meta["text_full"]
    network = golden_network(tensors, meta, prefix=f"{group}state.", attention="full", kv_heads=kv_heads)
    tokens, t = tensors[f"{case}.tokens"], tensors[f"{case}.t"]
    given = int(golden_meta[f"text_full.{case}"]["first_frame_condition"])
    texts = [tensors[f"{case}.text"], tensors[f"{case}.negative_text"]]
    shape = (tokens.shape[2] - given, *tokens.shape[3:])
    expected = [as_ours(tensors[f"{group}{case}.{name}"], *shape) for name in ("logits", "negative_logits")]
    for text, logits in zip(texts, expected):
        packed = network([tokens[0]], t, text, [len(text)], context_frames=given)
        torch.testing.assert_close(packed[0], logits, atol=1e-5, rtol=0)
    cache = network.text_cache(torch.cat(texts), list(map(len, texts)))
    dense = network.predict(tokens.expand(2, -1, -1, -1, -1), t.expand(2), cache, context_frames=given)
    torch.testing.assert_close(dense, torch.stack(expected), atol=1e-5, rtol=0)


def test_golden_loss_of_full_attention(golden, golden_meta):
    """Cross-entropy over predicted tokens, and of a pack each sample's weighted by the root of its positions."""
    tensors, meta = golden("text_full"), golden_meta["text_full"]
    network = golden_network(tensors, meta, attention="full")
    cases = ["image", "video", "video_i2v"]
    given = [int(golden_meta[f"text_full.{case}"]["first_frame_condition"]) for case in cases]
    texts = [tensors[f"{case}.text"] for case in cases]
    logits = network(
        [tensors[f"{case}.tokens"][0] for case in cases],
        torch.cat([tensors[f"{case}.t"] for case in cases]),
        torch.cat(texts),
        list(map(len, texts)),
        context_frames=given,
    )
    losses, weights = [], []
    for case, mine, first in zip(cases, logits, given):
        losses.append(F.cross_entropy(mine[None], tensors[f"{case}.targets"][:, :, first:].long()))
        weights.append(mine[0, 0].numel() ** meta["reweight_loss_by_scale"])
        torch.testing.assert_close(losses[-1], tensors[f"{case}.loss"].squeeze(), atol=1e-5, rtol=0)
    weights = torch.tensor(weights)
    packed = (torch.stack(losses) * weights).sum() / weights.sum()
    torch.testing.assert_close(packed, tensors["packed.loss"].squeeze(), atol=1e-5, rtol=0)


def test_each_scheme_draws_garbage_of_the_others_weights(golden, golden_meta):
    """They load without an error, which is why the scheme is asked for."""
    tensors, meta = golden("text_full"), golden_meta["text_full"]
    tokens, t, text = (tensors[f"image.{name}"] for name in ("tokens", "t", "text"))
    wrong = golden_network(tensors, meta, attention="one_way")([tokens[0]], t, text, [len(text)])[0]
    assert (wrong - as_ours(tensors["image.logits"], *tokens.shape[2:])).abs().max() > 0.02


@pytest.mark.parametrize("case", ["image", "video"])
def test_golden_rotary_tables(case, golden, golden_meta):
    tensors, meta = golden("text_bit"), golden_meta[f"text_bit.{case}"]
    positions = [visual_positions(meta["T"], meta["H"], meta["W"], meta["h_div_w_template"])]
    positions += [time_positions([512]), time_positions(range(meta["text_len"]))]
    cos, sin = rotary_3d(torch.cat(positions), 16)
    torch.testing.assert_close(cos, tensors[f"{case}.rope_cos"], atol=2e-6, rtol=0)
    torch.testing.assert_close(sin, tensors[f"{case}.rope_sin"], atol=2e-6, rtol=0)


def test_rows_and_columns_are_rounded_in_float32():
    """(template, budget) -> the rows and columns that float64 would place elsewhere, of all 90 buckets."""
    differing = {}
    for template, sizes in RESOLUTIONS.items():
        for budget, size in zip(BUDGETS, sizes):
            height, width = (side // 16 for side in size)
            places = visual_positions(1, height, width, template).view(height, width, 3)
            found = places[:, 0, 1].numpy(), places[0, :, 2].numpy()
            assert (
                places == torch.from_numpy(np.stack(np.broadcast_arrays(600, found[0][:, None], found[1]), -1))
            ).all()
            span_w = math.sqrt(225 * 75 / template)
            for axis, count, span in zip(range(2), (height, width), (int(template * span_w), int(span_w))):
                single = np.rint(np.arange(count, dtype=np.float32) * np.float32(span / count))
                double = np.rint(np.arange(count) * span / count)
                assert (found[axis] == single).all()
                if odd := np.flatnonzero(found[axis] != double).tolist():
                    differing.setdefault((template, budget), {})[["row", "column"][axis]] = odd
    assert differing == {
        (2.0, "0.92M"): {"column": [27]},
        (1.0, "2M"): {"row": [75], "column": [75]},
        (0.5, "0.92M"): {"row": [27]},
        (0.333, "2M"): {"row": [39]},
    }


@pytest.mark.filterwarnings("error:Mismatch dtype")  # RMSNorm would fall back to a slow path
@pytest.mark.parametrize("form", ["autocast", "weights"])
def test_golden_in_bfloat16(form, reference):
    network, tensors = reference
    tokens, t, text = (tensors[f"video.{name}"] for name in ("tokens", "t", "text"))
    expected = network.predict(tokens, t, network.text_cache(text, [7]))
    if form == "weights":
        network = network.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
        packed = network([tokens[0]], t, text, [7])[0]
        dense = network.predict(tokens, t, network.text_cache(text, [7]))[0]
    for logits in (packed, dense):
        assert logits.dtype == torch.float32
        assert (logits - expected[0]).norm() / expected.norm() < 2e-2


@pytest.mark.filterwarnings("error:Mismatch dtype")
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])  # FSDP casts them, autocast alone does not
def test_the_stream_is_float32_under_autocast(weights):
    network, seen = shaken().to(weights), set()
    for block in network.blocks:
        block.register_forward_hook(lambda _, given, made: seen.update((given[0].dtype, made.dtype)))
    tokens, t, text, lengths = samples([(1, 2, 3)] * 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network(tokens, t, text, lengths)
        cache = network.text_cache(text, lengths)
        network.predict(torch.stack(tokens), t, cache)
    assert seen == {torch.float32}
    assert cache.keys[0].dtype == cache.values[0].dtype == torch.bfloat16
    with torch.no_grad():
        network(tokens, t, text, lengths)
    assert seen == {torch.float32, weights}


@pytest.mark.parametrize("form", ["autocast", "weights"])
def test_the_head_is_float32_in_bfloat16(form):
    """RMSNorm and linear map of what the last block gave, by formula; nearly no logit is one that a bf16 can hold."""
    network, given = shaken(), []
    if form == "weights":
        network.bfloat16()
    network.head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    tokens, t, text, lengths = samples([(1, 2, 3)] * 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
        packed = torch.stack(network(tokens, t, text, lengths))
        dense = network.predict(torch.stack(tokens), t, network.text_cache(text, lengths))
    weight, bias, scale = (p.detach().double() for p in (network.head.out.weight, network.head.out.bias,
                                                         network.head.norm.weight))  # fmt: skip
    for logits, x in zip((packed, dense), given):
        assert logits.dtype == torch.float32
        assert (logits != logits.bfloat16().float()).double().mean() > 0.95
        x = x.double()
        expected = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale) @ weight.T + bias
        expected = expected.view(4, 1, 2, 3, 3, 4).permute(0, 5, 4, 1, 2, 3)
        torch.testing.assert_close(logits.double(), expected, atol=2e-6, rtol=2e-6)


def test_the_authors_initialization():
    """Every linear layer, the head's too, N(0, 0.02); biases 0, norms 1."""
    network = TextRefiner(**SMALL | {"width": 96, "text_width": 200})
    network.init_weights(torch.Generator().manual_seed(0))
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert {"token_embedding.linear", "time_embedding.first", "blocks.2.mlp.gate", "head.out"} <= linear
    for name, parameter in network.named_parameters():
        owner, kind = name.rsplit(".", 1)
        if owner not in linear or kind == "bias":
            assert (parameter == float("norm" in owner)).all(), name
        else:
            count = parameter.numel()  # six standard errors of a mean and of a standard deviation
            assert abs(parameter.mean().item()) < 6 * 0.02 / count**0.5, name
            assert abs(parameter.std().item() - 0.02) < 6 * 0.02 / (2 * count) ** 0.5, name
    assert network.config["initialization"] == "normal"


def test_a_zero_head_with_depth_gain():
    network = TextRefiner(**SMALL | {"width": 96, "text_width": 200}, initialization="zero_head")
    assert not network.head.out.weight.any()
    hidden = network.blocks[0].mlp.gate.weight
    assert hidden.abs().max().item() == pytest.approx((6 / sum(hidden.shape)) ** 0.5, rel=1e-2)
    out = network.blocks[2].mlp.out.weight  # three blocks, each adds twice
    assert out.abs().max().item() == pytest.approx((6 / sum(out.shape) / 6) ** 0.5, rel=1e-2)
    assert network.time_embedding.second.weight.std().item() == pytest.approx(0.02, rel=0.05)
    with pytest.raises(UserError, match=r"model\.initialization=ones: normal or zero_head"):
        TextRefiner(**SMALL, initialization="ones")


@pytest.mark.parametrize("labeling", ["ind", "bit"])
@both
def test_a_packed_batch_is_its_samples(scheme, labeling):
    classes = {"ind": 4, "bit": 2}[labeling]
    network = shaken(classes=classes, attention=scheme)
    tokens, t, text, lengths = samples(classes=classes)

    def gradients(logits):
        """Of the samples' losses, each with a weight of its own."""
        network.zero_grad()
        losses = [F.cross_entropy(mine[None], true[None]) for mine, true in zip(logits, tokens, strict=True)]
        sum((1 + i) * loss for i, loss in enumerate(losses)).backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    together, apart = network(tokens, t, text, lengths), one_by_one(network, tokens, t, text, lengths)
    for logits, alone, shape in zip(together, apart, SHAPES, strict=True):
        assert logits.shape == (classes, 3, *shape)
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)
    for (name, _), mine, alone in zip(network.named_parameters(), gradients(together), gradients(apart)):
        assert mine.abs().max() > 0, name
        torch.testing.assert_close(mine, alone, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@both
def test_by_flex_attention(scheme, monkeypatch):
    monkeypatch.setattr(attention, "_fused_flex_attention", lambda *kind: attention._flex_attention)
    network = shaken(attention=scheme, width=64)  # 16 a head, the least that flex takes
    with torch.no_grad():
        expected, flex = (network(*samples(), backend=backend) for backend in ("exact", "flex"))
    for logits, exact in zip(flex, expected, strict=True):
        torch.testing.assert_close(logits, exact, atol=1e-5, rtol=1e-5)


@both
def test_a_dense_batch_is_its_samples(scheme):
    """Texts of different lengths, computed once, looked up by rows."""
    network = shaken(attention=scheme)
    tokens, t, text, lengths = samples([(2, 3, 5)] * 4)
    expected = torch.stack(one_by_one(network, tokens, t, text, lengths))
    cache = network.text_cache(text, lengths)
    assert len(cache) == 4
    if scheme == "one_way":
        assert len(cache.keys) == len(cache.values) == 3
        assert cache.keys[0].shape == (4, 2, 16, 12)
    torch.testing.assert_close(network.predict(torch.stack(tokens), t, cache), expected, atol=1e-5, rtol=1e-5)
    rows = torch.tensor([1, 3, 0])  # a longest text less
    some = network.predict(torch.stack([tokens[i] for i in rows]), t[rows], cache, rows)
    torch.testing.assert_close(some, expected[rows], atol=1e-5, rtol=1e-5)
    same = network.predict(torch.stack(tokens[:2]), t[:2], cache, torch.tensor([2, 2]))
    torch.testing.assert_close(same, torch.stack(network(tokens[:2], t[:2], text[6:22].repeat(2, 1), [16, 16])))


def test_texts_see_only_themselves():
    network = shaken()
    text, lengths = samples()[2:]
    alone = network.text_cache(text[5:6], [1])
    among = network.text_cache(text, lengths)
    for block in range(3):
        torch.testing.assert_close(among.keys[block][1:2, :, :1], alone.keys[block], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(among.values[block][1:2, :, :1], alone.values[block], atol=1e-6, rtol=1e-5)


@both
def test_every_input_matters(scheme):
    network = shaken(attention=scheme)
    tokens, t, text, lengths = samples(SHAPES[:1], [4])
    base = network(tokens, t, text, lengths)[0]
    other = tokens[0].clone()
    other[0, 0, 0, 0] = (other[0, 0, 0, 0] + 1) % 4
    changes = [
        ([other], t, text, lengths),
        (tokens, t + 0.05, text, lengths),
        (tokens, t, text.flip(0), lengths),
        (tokens, t, text[:3], [3]),
    ]
    for change in changes:
        assert (network(*change)[0] - base).abs().max() > 1e-4
    assert (network(tokens, t, text, lengths, templates=[2.0])[0] - base).abs().max() > 1e-4


@both
def test_context_frames_are_seen_and_not_predicted(scheme):
    network = shaken(attention=scheme)
    tokens, t, text, lengths = samples([(3, 2, 4), (1, 4, 4), (2, 3, 3)], [2, 3, 4])
    whole = network(tokens, t, text, lengths)
    frames = [1, 0, 1]
    logits = network(tokens, t, text, lengths, context_frames=frames)
    for mine, all_frames, first in zip(logits, whole, frames, strict=True):
        assert mine.shape[2] == all_frames.shape[2] - first
        torch.testing.assert_close(mine, all_frames[:, :, first:], atol=1e-6, rtol=1e-5)
    cache = network.text_cache(text[:2], [2])
    dense = network.predict(tokens[0][None], t[:1], cache, context_frames=1)
    torch.testing.assert_close(dense[0], logits[0], atol=1e-5, rtol=1e-5)
    other = tokens[0].clone()
    other[:, 0] = (other[:, 0] + 1) % 4
    assert (network.predict(other[None], t[:1], cache, context_frames=1) - dense).abs().max() > 1e-4
    for refused in (3, -1, 4):
        with pytest.raises(ValueError, match="context frames of 3: some must be left"):
            network.predict(tokens[0][None], t[:1], cache, context_frames=refused)


def test_positions_of_frames_rows_and_columns():
    """The first frame, a condition or not, is at 600; every budget of pixels spans the same rows and columns."""
    positions = visual_positions(3, 4, 8, 0.5).view(3, 4, 8, 3)
    assert positions[:, 0, 0, 0].tolist() == [FIRST_FRAME, FIRST_FRAME + 1, FIRST_FRAME + 2] == [600, 601, 602]
    assert positions[1, :, 3, 1].tolist() == [0, 23, 46, 68]  # round(i * 91 / 4), halves to even
    assert positions[2, 1, :, 2].tolist() == [0, 23, 46, 69, 92, 114, 137, 160]
    assert torch.equal(positions[0, ..., 1:], visual_positions(1, 8, 16, 0.5).view(8, 16, 3)[::2, ::2, 1:])


def test_a_new_network_knows_nothing():
    logits = TextRefiner(**SMALL, initialization="zero_head")(*samples())
    assert all((sample == 0).all() and sample.dtype == torch.float32 for sample in logits)


def test_a_deep_new_networks_stream_keeps_its_size():
    torch.manual_seed(0)
    network = TextRefiner(**SMALL | {"depth": 24}, initialization="zero_head")
    sizes = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: sizes.append(output.square().mean().sqrt().item()))
    network(*samples())
    assert sizes[-1] < 4 * sizes[0]
    assert all(after < 1.5 * before for before, after in pairwise(sizes))


@both
def test_blocks_can_be_checkpointed(scheme):
    """Computed again on the way back, block by block, as training with little memory does."""
    network = shaken(attention=scheme)
    tokens, t, text, lengths = samples()

    def gradient():
        network.zero_grad()
        sum(logits.square().sum() for logits in network(tokens, t, text, lengths)).backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    expected = gradient()
    for block in network.blocks:
        block.forward = lambda *inputs, plain=block.forward: checkpoint(plain, *inputs, use_reentrant=False)
    for mine, plain in zip(gradient(), expected, strict=True):
        assert torch.equal(mine, plain)


@both
def test_compiled_blocks_change_neither_names_nor_logits(scheme):
    network = shaken(attention=scheme)
    names, expected = list(network.state_dict()), network(*samples())
    for block in network.blocks:
        block.compile(backend="eager", fullgraph=True)
    for logits, plain in zip(network(*samples()), expected, strict=True):
        torch.testing.assert_close(logits, plain)
    assert list(network.state_dict()) == names


def test_meta_construction_then_init_is_a_normal_construction():
    with torch.device("meta"):
        network = TextRefiner(**SMALL)
    assert not list(network.buffers())  # nothing that a file would not hold
    network = network.to_empty(device="cpu")
    torch.manual_seed(0)
    network.init_weights()
    torch.manual_seed(0)
    expected = TextRefiner(**SMALL)
    torch.manual_seed(0)
    expected.init_weights()
    for (name, mine), other in zip(network.named_parameters(), expected.parameters()):
        assert torch.equal(mine, other), name


def count(*, depth, width, heads, kv_heads=None, ratio=3.55, inputs=512, text=4096):
    """Parameters by docs/method.md#text-conditional-refiner, matrix by matrix."""
    hidden, head = round(ratio * width / 256) * 256, width // heads
    kv = head * (kv_heads or heads)
    block = 2 * width + 2 * head  # RMSNorms
    block += 2 * width * width + 2 * width * kv + 3 * width * hidden
    embeddings = inputs * width + width + text * width + width
    time = 256 * width + width + width * width + width
    return depth * block + embeddings + time + width + width * inputs + inputs


@pytest.mark.parametrize(
    ("size", "changes", "parameters"),
    [
        ("2B", {}, 2_197_832_448),
        ("8B", {}, 7_890_859_520),
        ("8B_grouped", {}, 8_796_829_184),
        ("tiny", {}, 18_227_200),
        ("2B", {"kv_heads": 6}, 1_999_651_584),
        ("tiny", {"channels": 64, "classes": 16}, 18_752_000),
    ],
)
def test_parameter_counts(size, changes, parameters):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"model.{key}={value}" for key, value in changes.items()]
        config = compose("train", [f"model=text_refiner_{size}", "tokenizer.ckpt=x", *overrides])
    with torch.device("meta"):
        network = build_network(config.model)
    sizes = {
        "2B": {"depth": 28, "width": 2304, "heads": 18},
        "8B": {"depth": 36, "width": 4096, "heads": 32, "ratio": 3},
        "8B_grouped": {"depth": 36, "width": 4096, "heads": 32, "ratio": 4, "kv_heads": 8},
        "tiny": {"depth": 4, "width": 512, "heads": 4},
    }[size] | {key: value for key, value in changes.items() if key == "kv_heads"}
    inputs = changes.get("channels", 256) * changes.get("classes", 2)
    expected = count(**sizes, inputs=inputs)
    assert sum(p.numel() for p in network.parameters()) == parameters == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 52, "heads": 8}, "model.width=52 must be a multiple of 2 \\* model.heads=8"),
        ({"heads": 12}, "model.width=48 must be .* at least 6 a head"),
        ({"kv_heads": 3}, "model.kv_heads=3 must divide model.heads=4"),
        ({"max_text": 513}, "model.max_text=513 must be at most 512"),
        ({"mlp_ratio": 1.0}, "model.mlp_ratio=1.0 leaves nothing"),
        ({"channels": 0}, "model.channels=0 must be a whole number, at least 1"),
        ({"attention": "both"}, "model.attention=both: one_way or full"),
        ({"depth": 2.0}, "model.depth=2.0 must be a whole number"),
    ],
)
def test_sizes_that_do_not_fit_name_their_key(changes, words):
    with pytest.raises(UserError, match=words):
        TextRefiner(**SMALL | changes)


def test_inputs_that_do_not_fit_are_refused():
    network = TextRefiner(**SMALL)
    tokens, t, text, lengths = samples()
    with pytest.raises(ValueError, match=r"tokens must be \[B, 3, T, H, W\], got \[1, 2, 1, 4, 4\]"):
        network([tokens[0][:2], *tokens[1:]], t, text, lengths)
    with pytest.raises(ValueError, match=r"text must be \[29, 10\], got \[28, 10\]"):
        network(tokens, t, text[1:], lengths)
    with pytest.raises(ValueError, match="texts must have 1 to 16 tokens"):
        network(tokens, t, text, [5, 0, 17, 7])
    with pytest.raises(ValueError, match="4 samples have 3 signal ratios"):
        network(tokens, t[:3], text, lengths)
    with pytest.raises(ValueError, match="1 samples have 1 signal ratios and 4 texts"):
        network.predict(tokens[0][None], t[:1], network.text_cache(text, lengths))


def test_there_and_back(tmp_path):
    network = shaken()
    again = TextRefiner.from_pretrained(network.save_pretrained(tmp_path / "refiner"))
    assert again.config == network.config == SMALL | {"initialization": "normal"}
    for logits, expected in zip(again(*samples()), network(*samples()), strict=True):
        assert torch.equal(logits, expected)
    config = json.loads((tmp_path / "refiner" / "config.json").read_text())
    (tmp_path / "refiner" / "config.json").write_text(json.dumps(config | {"kv_heads": "many"}))
    with pytest.raises(UserError, match=r"describes no TextRefiner \(model\.kv_heads=many must be a whole number"):
        TextRefiner.from_pretrained(tmp_path / "refiner")
