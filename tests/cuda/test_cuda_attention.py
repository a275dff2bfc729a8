"""Flex attention, forward and backward, against attention sample by sample; checkpointing; torch.compile."""

import pytest
import test_attention
import test_class_refiner
import test_compiling
import test_text_refiner
import torch
from on_device import DEVICE, ON_GPU, distance, in_bfloat16, on
from torch._dynamo.utils import counters

from grn.networks.attention import packed_attention
from grn.training.activations import checkpoint_activations
from grn.training.compiling import compile_network

pytestmark = pytest.mark.cuda

BACKEND = "flex" if ON_GPU else "exact"  # flex has no gradients on the CPU
PACKS = {
    "one_way": test_attention.LENGTHS,
    "full": [(sum(sample), 0) for sample in test_attention.LENGTHS],
    "images of 0.06M": [(257, 30)] * 9 + [(1, 400)],
    "a clip": [(2100, 77)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(4, 16), (2, 128)])
def test_flex_attention_and_its_gradients(pack, dtype, kv_heads, head_dim):
    lengths = PACKS[pack]
    generator = torch.Generator().manual_seed(0)
    total = sum(map(sum, lengths))
    q, k, v, up = (
        torch.randn(1, heads, total, head_dim, generator=generator).to(DEVICE, dtype)
        for heads in (4, kv_heads, kv_heads, 4)
    )
    results = []
    for backend, kind in ((BACKEND, dtype), ("exact", torch.float64)):
        given = [one.detach().to(kind).requires_grad_() for one in (q, k, v)]
        made = packed_attention(lengths, DEVICE, backend=backend)(*given)
        results.append([made, *torch.autograd.grad(made, given, up.to(kind))])
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for name, found, exact in zip(("output", "of queries", "of keys", "of values"), *results):
        assert distance(found, exact) < bound, name


def text_gradients(network, *, backend=BACKEND):
    network.zero_grad()
    tokens, t, text, lengths = test_text_refiner.samples()
    logits = network(*on(DEVICE, tokens, t, text), lengths, backend=backend)
    sum(sample.square().mean() for sample in logits).backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def class_gradients(network, **_):
    network.zero_grad()
    network(*on(DEVICE, test_class_refiner.inputs(6))).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def text_refiner(scheme="full"):
    return test_text_refiner.shaken(attention=scheme, width=64).to(DEVICE)  # 16 a head, the least that flex takes


KINDS = {
    "classes": (lambda: test_class_refiner.shaken().to(DEVICE), class_gradients),
    "full": (text_refiner, text_gradients),
    "one_way": (lambda: text_refiner("one_way"), text_gradients),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_packs_are_those_sample_by_sample_in_float64(kind):
    build, gradients = KINDS[kind]
    found, exact = gradients(build()), gradients(build().double(), backend="exact")
    for name, gradient in exact.items():
        assert distance(found[name], gradient) < 1e-4, name


@pytest.mark.parametrize(
    ("kind", "mode", "compiled"),
    [
        *((kind, mode, False) for kind in KINDS for mode in ("selective", "full")),
        ("classes", "selective", True),
        ("full", "selective", True),
        ("full", "full", True),
    ],
)
def test_checkpointing_leaves_gradients_as_they_are(kind, mode, compiled):
    build, gradients = KINDS[kind]
    expected, network = gradients(build()), build()
    checkpoint_activations(network, mode)
    if compiled:
        for block in network.blocks:
            block.compile()
    for name, gradient in gradients(network).items():
        assert distance(gradient, expected[name]) < 1e-4, name
    with in_bfloat16():
        for name, gradient in gradients(network).items():
            assert gradient.isfinite().all(), name


@pytest.mark.parametrize(("by_blocks", "bf16"), [(False, False), (True, True)])
@torch.no_grad()
def test_a_compiled_class_refiner(by_blocks, bf16):
    plain, network = KINDS["classes"][0](), KINDS["classes"][0]()
    compile_network(network, DEVICE, key="compile", by_blocks=by_blocks)
    given = on(DEVICE, test_class_refiner.inputs())
    with in_bfloat16(bf16):
        assert distance(network(*given), plain(*given)) < (2e-2 if bf16 else 1e-5)


@pytest.mark.parametrize("scheme", ["one_way", "full"])
def test_a_compiled_text_refiner_is_compiled_anew_for_few_packs(scheme):
    """Ten packs, trained on; then sampled from in batches of one size and of others."""
    plain, network = (test_compiling.randomized(test_compiling.of_packs(attention=scheme)).to(DEVICE) for _ in range(2))
    if not ON_GPU:
        pytest.skip("a text refiner is compiled for GPUs alone")
    compile_network(network, DEVICE, key="compile")
    generator = torch.Generator().manual_seed(0)
    counters.clear()

    def pack(number):
        count = 1 + number % 5
        lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
        tokens = [torch.randint(4, (3, 1, 4 + number, 5 + i), generator=generator) for i in range(count)]
        text = torch.randn(sum(lengths), 10, generator=generator)
        return *on(DEVICE, tokens, torch.rand(count, generator=generator)), (text.to(DEVICE), lengths)

    for number in range(10):
        given, losses = pack(number), []
        for one in (plain, network):
            one.zero_grad()
            losses.append(sum(sample.square().mean() for sample in one(*given)))
            losses[-1].backward()
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-4)
        for (name, a), b in zip(plain.named_parameters(), network.parameters()):
            assert distance(b.grad, a.grad) < 1e-3, (number, name)
    assert 0 < counters["stats"]["unique_graphs"] <= 8
    with torch.inference_mode():
        text = torch.randn(20, 10, generator=generator).to(DEVICE)
        for rows in (2, 4, 7):
            batch = torch.randint(4, (rows, 3, 1, 4, 6), generator=generator).to(DEVICE)
            logits = [
                one.predict(batch, torch.rand(rows, generator=torch.Generator().manual_seed(1)).to(DEVICE),
                            one.text_cache(text, [13, 7]), torch.arange(rows) % 2)
                for one in (plain, network)
            ]  # fmt: skip
            torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] <= 20
