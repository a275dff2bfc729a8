import pytest
import torch
from torch.nn.attention import flex_attention as flex

from grn.compiling import compile_network
from grn.errors import UserError
from grn.networks.captioned_refiner import CaptionedRefiner
from grn.networks.class_refiner import ClassRefiner
from grn.networks.text_refiner import TextRefiner

GPU = torch.device("cuda")


def of_packs(depth=2):
    sizes = {"channels": 3, "classes": 4, "depth": depth, "width": 64, "heads": 4, "mlp_ratio": 4.0}
    return CaptionedRefiner(TextRefiner(**sizes, text_width=10, max_text=64))


def of_classes():
    sizes = {"channels": 3, "classes": 4, "num_labels": 5, "size": 4, "depth": 2, "width": 16, "heads": 2}
    return ClassRefiner(**sizes, bottleneck=8, context_start=1)


@pytest.fixture
def calls(monkeypatch):
    """Of what was compiled, with `torch.compile` doing nothing else than to count them."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda call, **_: lambda *given: made.append(call) or call(*given))
    with torch._dynamo.config.patch(recompile_limit=8):
        yield made


def test_a_text_refiner_is_compiled_wherever_it_runs(calls):
    network = of_packs()
    names = list(network.state_dict())
    compile_network(network, GPU, key="compile")
    with torch.no_grad():
        cache = network.text_cache(torch.randn(5, 10), [5])
        assert len(calls) == 2
        network.predict(torch.zeros(1, 3, 1, 4, 4, dtype=torch.long), torch.rand(1), cache)
        assert len(calls) == 4
        network([torch.zeros(3, 1, 4, 4, dtype=torch.long)], torch.rand(1), (torch.randn(5, 10), [5]))
        assert len(calls) == 6
    assert list(network.state_dict()) == names


@pytest.mark.parametrize(("by_blocks", "count"), [(False, 1), (True, 2)])
def test_a_class_refiner_is_compiled_whole_unless_sharded(by_blocks, count, calls):
    network = of_classes()
    compile_network(network, torch.device("cpu"), key="compile", by_blocks=by_blocks)
    network(torch.zeros(1, 3, 1, 4, 4, dtype=torch.long), torch.rand(1), torch.tensor([2]))
    assert len(calls) == count


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_where_packs_would_be_compiled_one_by_one(device, calls):
    with pytest.raises(
        UserError, match=rf"^cluster\.compile=true does not go with a text refiner on {device}: leave it"
    ):
        compile_network(of_packs(), torch.device(device), key="cluster.compile")


@torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True)
def test_few_graphs_serve_all_packs_texts_and_samples(monkeypatch):
    """Of training, validation and sampling; the blocks' graphs run as they are."""
    graphs, compile = [], torch.compile
    backend = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda call, **given: compile(call, **{"backend": backend, **given}))
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    torch._dynamo.reset()
    network = of_packs(depth=1)
    compile_network(network, GPU, key="compile")
    generator = torch.Generator().manual_seed(0)

    def tokens(*shape):
        return torch.randint(4, (3, *shape), generator=generator)

    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            for sides, lengths in (
                ([6, 12, 9], [5, 40, 7]),
                ([2], [3]),
                ([12] * 5, [30, 1, 2, 9, 60]),
                ([4, 9], [8, 8]),
            ):
                text, t = torch.randn(sum(lengths), 10), torch.rand(len(sides))
                network([tokens(1, side, side + 1) for side in sides], t, (text, lengths), backend="flex")
                if mode is torch.enable_grad:
                    continue
                cache = network.text_cache(text, lengths, backend="flex")
                for rows in (3, 6, 9):
                    asked = torch.randint(len(lengths), (rows,), generator=generator)
                    batch = torch.stack([tokens(1, 4, 6) for _ in range(rows)])
                    network.predict(batch, torch.rand(rows), cache, asked)
    assert 8 < len(graphs) <= 20
    torch._dynamo.reset()
