"""Every golden on the GPU, in float32 and bfloat16; draws, and samples in float64, that are those of the CPU."""

import pytest
import test_class_refiner
import test_sampler
import test_text_refiner
import torch
from on_device import DEVICE, distance, in_bfloat16, on
from refining import refine

from grn.checkpoints.official_tokenizer import TOKENIZER_RULES
from grn.method import corruption, hbq, philox
from grn.method.philox import Stream
from grn.method.sampler import Sampler
from grn.method.schedules import Cosine, EntropyGuided, Linear, Shifted
from grn.networks.conditions import Labels, Text
from grn.networks.tokenizer import HBQTokenizer, for_inference
from grn.weights.mapping import load_strict, rename

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("name", ["c2i_ind", "c2i_bit"])
@torch.no_grad()
def test_class_refiners(name, golden, golden_meta):
    tensors = golden(name)
    network = on(DEVICE, test_class_refiner.golden_network(name, tensors, golden_meta[name]))
    given = on(DEVICE, tensors["tokens"].unsqueeze(2), tensors["t"], tensors["labels"])
    torch.testing.assert_close(network(*given).squeeze(3).cpu(), tensors["logits"], atol=2e-5, rtol=0)
    with in_bfloat16():
        assert distance(network(*given).squeeze(3), tensors["logits"]) < 1e-2


@pytest.mark.parametrize(
    ("scheme", "case", "group", "kv_heads"),
    [
        ("one_way", "image", "", None),
        ("one_way", "video", "", None),
        ("full", "image", "", 4),
        ("full", "video", "", 4),
        ("full", "video_i2v", "", 4),
        ("full", "video", "grouped.", 2),
    ],
)
@torch.no_grad()
def test_text_refiners(scheme, case, group, kv_heads, golden, golden_meta):
    """Packed, by flex attention, and dense."""
    name = {"one_way": "text_bit", "full": "text_full"}[scheme]
    tensors, meta = golden(name), golden_meta[name]
    network = test_text_refiner.golden_network(
        tensors, meta, prefix=f"{group}state.", attention=scheme, kv_heads=kv_heads
    )
    network = network.to(DEVICE)
    given = int(golden_meta[f"{name}.{case}"].get("first_frame_condition", 0))
    tokens, t, text = on(DEVICE, *(tensors[f"{case}.{part}"] for part in ("tokens", "t", "text")))
    shape = (tokens.shape[2] - given, *tokens.shape[3:])
    expected = test_text_refiner.as_ours(tensors[f"{group}{case}.logits"], *shape)

    def both_forms():
        yield network([tokens[0]], t, text, [len(text)], context_frames=given)[0]
        yield network.predict(tokens, t, network.text_cache(text, [len(text)]), context_frames=given)[0]

    for logits in both_forms():
        torch.testing.assert_close(logits.cpu(), expected, atol=2e-5, rtol=0)
    with in_bfloat16():
        for logits in both_forms():
            assert logits.dtype == torch.float32
            assert distance(logits, expected) < 2e-2


@pytest.mark.parametrize("frames", [1, 17])
@torch.no_grad()
def test_tokenizers(frames, golden, golden_meta):
    """Whole and in a stream; in bfloat16, channels last, as `for_inference` leaves it."""
    tensors, sizes = golden("tokenizer"), golden_meta["tokenizer"]
    network = HBQTokenizer(
        latent_channels=sizes["latent_channels"],
        dim=sizes["dim"],
        decoder_dim=sizes["dec_dim"],
        multipliers=sizes["dim_mult"],
        blocks_per_stage=sizes["num_res_blocks"],
        temporal=sizes["temperal_downsample"],
    )
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    load_strict(network, rename(state, TOKENIZER_RULES), source="golden")
    network = network.to(DEVICE).eval()
    video, features = on(DEVICE, tensors[f"T{frames}.video"], tensors[f"T{frames}.features"])
    made = network.encode(video), network.decode(features)
    expected = tensors[f"T{frames}.features"], tensors[f"T{frames}.decoded"]
    for one, other in zip(made, expected):
        torch.testing.assert_close(one.cpu(), other, atol=1e-4, rtol=0)
    streamed = [list(network.encode_stream(video.unbind(2))), list(network.decode_stream(features.unbind(2)))]
    for one, other in zip(streamed, expected):
        torch.testing.assert_close(torch.stack(one, dim=2).cpu(), other, atol=1e-4, rtol=0)
    tokens = network.tokenize(video, "ind").cpu()
    signs = expected[0].abs() > 1e-3  # where rounding cannot flip the first bit
    first = hbq.dequantize(tokens, network.rounds, "ind").sign()
    assert torch.equal(first[signs], expected[0].sign()[signs])
    fast = for_inference(network)
    with in_bfloat16():
        assert distance(fast.encode(video), expected[0]) < 3e-2
        assert distance(fast.decode(features), expected[1]) < 3e-2


@pytest.mark.parametrize("seed", [0, -5, 2**63 + 11])
def test_draws(seed):
    """Bits and not numbers near them; normal ones by a function of another library."""
    ids, step = torch.tensor([0, 7, 2**32 - 1]), torch.tensor([3, 0, 2**31])
    for call in (
        lambda ids, step: philox.uniform(seed, Stream.TOKENS, ids, step, (3, 5)),
        lambda ids, step: philox.integers(seed, Stream.NOISE, ids, step, (7,), 16),
        lambda ids, _: philox.uniform(seed, Stream.KEEP, ids, 9),
    ):
        assert torch.equal(call(*on(DEVICE, ids, step)).cpu(), call(ids, step))
    normal = [philox.normal(seed, Stream.SIGNAL_RATIO, one, 4, (100,)).cpu() for one in (ids.to(DEVICE), ids)]
    torch.testing.assert_close(*normal, atol=1e-6, rtol=1e-6)
    tokens, t = torch.randint(16, (3, 4, 1, 8, 8)), torch.tensor([0.1, 0.5, 0.9])
    noisy = [
        corruption.corrupt(*on(device, tokens, t), 16, seed=seed, ids=ids.to(device), step=2).cpu()
        for device in (DEVICE, "cpu")
    ]
    assert torch.equal(*noisy)


SAMPLERS = [
    Sampler(Linear(9), temperature=1.2, guidance=2.0, guidance_interval=(0.3, 1.0)),
    Sampler(Cosine(6), update="psi", kappa=0.5),
    Sampler(Shifted(8), guidance=3.0),
    Sampler(EntropyGuided(warmup=2, scale=60.0, offset=-40.0, min_steps=4, max_steps=14), guidance=1.5),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda it: type(it.schedule).__name__)
@torch.no_grad()
def test_samples_of_classes_are_those_of_the_cpu(sampler):
    """In float64, where rounding cannot flip a draw: to the last token."""
    made = []
    for device in ("cpu", DEVICE):
        network = test_sampler.double_network().to(device)
        labels, ids = on(device, torch.arange(40) % test_sampler.NULL, torch.arange(40))
        made.append(
            refine(
                lambda tokens, t, condition, network=network: network(tokens, t, condition.index),
                Labels(labels, test_sampler.NULL),
                sampler,
                shape=(3, 1, 4, 4),
                classes=5,
                seed=3,
                ids=ids,
            )
        )
    assert torch.equal(made[0].tokens, made[1].tokens.cpu())
    assert torch.equal(made[0].steps, made[1].steps)
    torch.testing.assert_close(made[0].trace, made[1].trace, equal_nan=True, atol=1e-6, rtol=0)


@torch.no_grad()
def test_samples_of_texts_are_those_of_the_cpu():
    made = []
    for device in ("cpu", DEVICE):
        network = test_text_refiner.shaken(attention="full").double().to(device)
        text = torch.randn(12, 10, generator=torch.Generator().manual_seed(0)).double().to(device)
        cache = network.text_cache(text, [5, 4, 3])
        rows = torch.arange(6)
        made.append(
            refine(
                lambda tokens, t, given, network=network: network.predict(tokens, t, given.cache, given.index),
                Text(cache, rows % 2, torch.full_like(rows, 2)),
                SAMPLERS[0],
                shape=(3, 2, 4, 6),
                classes=4,
                seed=3,
                ids=rows.to(device),
            ).tokens.cpu()
        )
    assert torch.equal(*made)
