"""What a GPU would be given, without one: networks on fake CUDA, one graph where one is compiled, float64.

CI runs this on the oldest PyTorch that is supported, too.
"""

import functools

import pytest
import test_class_refiner
import test_refiner_module
import test_text_refiner
import test_tokenizer
import torch
from fake_cuda import FakeCuda
from torch._dynamo import explain

from grn.method import sampler as sampling
from grn.networks.discriminator import PatchDiscriminator
from grn.networks.text_encoder import ByteT5
from grn.sampling import refinement
from grn.sampling.request import Request
from grn.training.activations import checkpoint_activations

schemes = pytest.mark.parametrize("scheme", [pytest.param("one_way", marks=pytest.mark.full), "full"])


def on_cuda(*values):
    return [
        value.to("cuda") if isinstance(value, torch.Tensor) else [it.to("cuda") for it in value] for value in values
    ]


def assert_on_cuda(network, *results, dtype=torch.float32):
    for result in results:
        assert (result.device.type, result.dtype) == ("cuda", dtype)
    gradients = [parameter.grad for parameter in network.parameters() if parameter.requires_grad]
    assert all(gradient.device.type == "cuda" for gradient in gradients)


@pytest.mark.parametrize(("bf16", "mode"), [(True, "none"), (False, "selective"), (True, "full")])
def test_a_class_refiner_on_cuda(bf16, mode):
    with FakeCuda() as fake:
        network = test_class_refiner.shaken().to("cuda")
        checkpoint_activations(network, mode)
        given = on_cuda(*test_class_refiner.inputs())
        fake.waits.clear()
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            logits = network(*given)
        logits.square().mean().backward()
        assert_on_cuda(network, logits)
    assert logits.shape == (3, 4, 3, 1, 4, 4)
    assert fake.waits == []


@schemes
@pytest.mark.parametrize("bf16", [False, True])
def test_a_text_refiner_on_cuda(bf16, scheme):
    """Packed, with gradients, and dense."""
    with FakeCuda() as fake:
        network = test_text_refiner.shaken(attention=scheme).to("cuda")
        tokens, t, text, lengths = test_text_refiner.samples()
        tokens, t, text = on_cuda(tokens, t, text)
        batch = torch.zeros(4, 3, 1, 4, 6, dtype=torch.long, device="cuda")
        fake.waits.clear()
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            packed = network(tokens, t, text, lengths)
            dense = network.predict(batch, t, network.text_cache(text, lengths), torch.tensor([3, 1, 1, 0]))
        sum(logits.square().mean() for logits in packed).backward()
        assert_on_cuda(network, *packed, dense)
    assert [tuple(logits.shape) for logits in packed] == [(4, 3, *shape) for shape in test_text_refiner.SHAPES]
    assert dense.shape == (4, 4, 3, 1, 4, 6)
    assert fake.waits == []


@pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_tokenizer_and_its_judges_on_cuda(bf16):
    """Whole and in a stream; what trains it; tokens of both labelings."""
    with FakeCuda() as fake:
        network = test_tokenizer.tiny().to("cuda")
        video = torch.zeros(2, 3, 5, 16, 24, device="cuda")
        discriminator = PatchDiscriminator(layers=2, width=8, dimensions=3).to("cuda")
        fake.waits.clear()
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            made, features = network(video)
            (made.square().mean() + discriminator(made).float().mean()).backward()
        assert_on_cuda(network, made.float(), features)
        with torch.no_grad():
            streamed = list(network.decode_stream(network.encode_stream(video.unbind(2))))
            tokens = [network.tokenize(video, labeling) for labeling in ("ind", "bit")]
    assert made.shape == video.shape
    assert [frame.shape for frame in streamed] == [video[:, :, 0].shape] * 5
    assert {kind.dtype for kind in tokens} == {torch.long}
    assert fake.waits == []


def test_a_text_encoder_on_cuda():
    with FakeCuda():
        encoder = ByteT5(width=16, depth=1, heads=2, hidden=16, max_length=32).to("cuda")
        features, lengths = encoder(["a seven", ""])
        features.square().mean().backward()
        assert_on_cuda(encoder, features)
    assert (features.shape, list(lengths)) == ((9, 16), [8, 1])


def graph_breaks(call, *arguments, **named):
    torch._dynamo.reset()
    found = explain(call)(*arguments, **named)
    assert found.graph_count >= 1
    return [str(reason.reason).splitlines()[0] for reason in found.break_reasons]


@pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.full), True])
def test_the_class_refiners_forward_is_one_graph(bf16):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert graph_breaks(test_class_refiner.shaken(), *test_class_refiner.inputs()) == []


@schemes
def test_the_text_refiners_forward_is_one_graph(scheme):
    network = test_text_refiner.shaken(attention=scheme)
    tokens, t, text, lengths = test_text_refiner.samples()
    assert graph_breaks(network, tokens, t, text, lengths) == []
    assert graph_breaks(network.text_cache, text, lengths) == []
    with torch.autocast("cpu", torch.bfloat16):
        assert graph_breaks(network, tokens, t, text, lengths) == []


@pytest.mark.parametrize("update", sampling.UPDATES)
def test_what_a_step_of_sampling_does_on_the_device_is_one_graph(update, monkeypatch):
    """And the graph is drawn as the step draws."""
    draw, drawn = sampling.draw, []
    monkeypatch.setattr(refinement, "draw", lambda *a, **k: drawn.append((a, k)) or draw(*a, **k))
    request = Request(
        num=4, seed=1, sampler=sampling.Sampler(sampling.Linear(6), guidance=2.0, update=update, kappa=0.5)
    )
    module = test_refiner_module.build().eval()
    torch.nn.init.normal_(module.network.head.out.weight, generator=torch.Generator().manual_seed(0))
    steps = module.bundle.refinement(request, batch_size=4)
    next(steps), next(steps)
    arguments, named = drawn[-1]
    with torch.no_grad():
        assert graph_breaks(functools.partial(draw, *arguments[:1]), *arguments[1:], **named) == []
        graph = torch.compile(draw, backend="eager", fullgraph=True)
        for one, other in zip(graph(*arguments, **named), draw(*arguments, **named)):
            assert torch.equal(one, other)


@schemes
@torch.no_grad()
def test_packed_and_dense_are_equal_in_float64(scheme):
    network = test_text_refiner.shaken(attention=scheme).double()
    tokens, t, text, lengths = test_text_refiner.samples([(2, 3, 5)] * 4)
    t, text = t.double(), text.double()
    packed = torch.stack(network(tokens, t, text, lengths))
    dense = network.predict(torch.stack(tokens), t, network.text_cache(text, lengths))
    assert packed.dtype == dense.dtype == torch.float64
    torch.testing.assert_close(packed, dense, atol=1e-13, rtol=1e-13)
