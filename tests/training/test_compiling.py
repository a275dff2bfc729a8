from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex
from torch.overrides import TorchFunctionMode

from grn.networks.captioned_refiner import CaptionedRefiner
from grn.networks.class_refiner import ClassRefiner
from grn.networks.text_refiner import TextRefiner
from grn.runtime.errors import UserError
from grn.training.compiling import REPLAYING, Mode, check_mode, compile_network

GPU = torch.device("cuda")


def of_packs(depth=2, attention="one_way"):
    sizes = {"channels": 3, "classes": 4, "depth": depth, "width": 64, "heads": 4, "mlp_ratio": 4.0}
    return CaptionedRefiner(TextRefiner(**sizes, attention=attention, text_width=10, max_text=64))


def of_classes():
    sizes = {"channels": 3, "classes": 4, "num_labels": 5, "size": 4, "depth": 2, "width": 16, "heads": 2}
    return ClassRefiner(**sizes, bottleneck=8, context_start=1)


class Products(TorchFunctionMode):
    """Counts the matrix products of a network's blocks as they are computed, one by one."""

    def __init__(self, network):
        super().__init__()
        self.count, self.inside = 0, False
        for block in network.blocks:
            block.register_forward_pre_hook(lambda *_: setattr(self, "inside", True))
            block.register_forward_hook(lambda *_: setattr(self, "inside", False))

    def __torch_function__(self, function, types, arguments=(), named=None):
        self.count += self.inside and function is F.linear
        return function(*arguments, **named or {})


@pytest.fixture
def compiled(monkeypatch):
    """The numbers of matrix products of the graphs that run, in their order; they run as they are."""
    ran, compile = [], torch.compile

    def backend(graph, _):
        count = sum(node.target is F.linear for node in graph.graph.nodes)
        return lambda *given: ran.append(count) or graph(*given)

    monkeypatch.setattr(torch, "compile", lambda call, **given: compile(call, **{"backend": backend, **given}))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield ran
    torch._dynamo.reset()


def randomized(network):
    for parameter in network.parameters():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return network


@torch.no_grad()
def test_a_text_refiner_is_compiled_wherever_it_runs(compiled):
    plain, network = randomized(of_packs()), randomized(of_packs())
    products = Products(plain)
    compile_network(network, GPU, key="compile")
    text, t = torch.randn(5, 10), torch.rand(1)
    calls = {
        "training": lambda one: one([torch.ones(3, 1, 4, 4, dtype=torch.long)], t, (text, [5])),
        "of texts": lambda one: one.text_cache(text, [5]),
        "sampling": lambda one: one.predict(torch.ones(1, 3, 1, 4, 4, dtype=torch.long), t, one.text_cache(text, [5])),
    }
    for kind, call in calls.items():
        with products:
            expected = call(plain)
        found = call(network)
        if kind != "of texts":
            torch.testing.assert_close(found, expected)
        assert sum(compiled) == products.count > 0, kind
        products.count = 0
        compiled.clear()
    assert list(network.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("by_blocks", [False, True])
@torch.no_grad()
def test_a_class_refiner_is_compiled_whole_unless_sharded(by_blocks, compiled):
    plain, network = randomized(of_classes()), randomized(of_classes())
    given = (torch.ones(1, 3, 1, 4, 4, dtype=torch.long), torch.rand(1), torch.tensor([2]))
    compile_network(network, torch.device("cpu"), key="compile", by_blocks=by_blocks)
    found = network(*given)
    with Products(plain) as products:
        torch.testing.assert_close(found, plain(*given))
    if by_blocks:  # so that the weights of one are gathered, and let go, at a time
        assert compiled == [products.count // 2] * 2
    else:
        (whole,) = compiled
        assert whole > products.count


@pytest.mark.parametrize("mode", get_args(Mode))
def test_the_mode_is_what_torch_compile_is_told(mode, monkeypatch):
    told, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **given: told.append(given) or compile(call, backend="eager"))
    compile_network(of_classes(), GPU, key="compile", mode=mode)
    compile_network(of_classes(), GPU, key="compile", mode=mode, by_blocks=True)
    assert told == [{"mode": mode}] * 3
    if mode not in REPLAYING:
        compile_network(of_packs(), GPU, key="compile", mode=mode)
        assert told == [{"mode": mode}] * 5
        return
    with pytest.raises(UserError, match=rf"^compile_mode={mode} does not go with a text refiner, .*no-cudagraphs does"):
        compile_network(of_packs(), GPU, key="compile", mode=mode)


@pytest.mark.parametrize(
    ("mode", "compiles", "complaint"),
    [
        ("fast", True, r"^cluster\.compile_mode=fast: choose among default, reduce-overhead"),
        (None, True, r"^cluster\.compile_mode=None: choose"),
        ("max-autotune-no-cudagraphs", False, r"^cluster\.compile_mode=\S+ goes with cluster\.compile=true alone"),
        ("reduce-overhead", True, r"^cluster\.compile_mode=reduce-overhead is for grn.evaluate"),
        ("max-autotune", True, r"^cluster\.compile_mode=max-autotune is for grn.evaluate"),
    ],
)
def test_modes_that_do_not_go(mode, compiles, complaint):
    with pytest.raises(UserError, match=complaint):
        check_mode(mode, compiles, key="cluster.compile", trains=True)
    assert check_mode("max-autotune-no-cudagraphs", True, key="cluster.compile", trains=True)
    assert check_mode("reduce-overhead", True, key="compile") == "reduce-overhead"


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_where_packs_would_be_compiled_one_by_one(device):
    with pytest.raises(
        UserError, match=rf"^cluster\.compile=true does not go with a text refiner on {device}: leave it"
    ):
        compile_network(of_packs(), torch.device(device), key="cluster.compile")


@pytest.mark.parametrize("attention", ["one_way", pytest.param("full", marks=pytest.mark.full)])
@torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True)
def test_few_graphs_serve_all_packs_texts_and_samples(attention, monkeypatch):
    """Of training, validation and sampling; the blocks' graphs run as they are."""
    graphs, compile = [], torch.compile
    backend = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda call, **given: compile(call, **{"backend": backend, **given}))
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    torch._dynamo.reset()
    network = of_packs(depth=1, attention=attention)
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
