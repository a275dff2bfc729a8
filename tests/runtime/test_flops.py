import pytest
import torch
from torch import nn

from grn.networks.class_refiner import ClassRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.flops import forward_flop, hollow, training_flop

SMALL = {
    "channels": 3, "classes": 4, "num_labels": 5, "size": 4, "depth": 3, "width": 32, "heads": 2, "bottleneck": 8,
    "context_start": 1, "context_tokens": 2,
}  # fmt: skip
META = torch.device("meta")


def inputs(size, channels, batch=1):
    tokens = torch.zeros(batch, channels, 1, size, size, dtype=torch.long, device=META)
    return tokens, torch.zeros(batch, device=META), torch.zeros(batch, dtype=torch.long, device=META)


def expected_forward(depth, width, bottleneck, context_start, context_tokens, size, channels, classes, **_):
    """A multiplication and an addition for every weight and token; nothing else multiplies matrices."""
    hidden, positions = int(4 * width * 2 / 3), size**2
    total = positions * (channels * classes * bottleneck + bottleneck * width)
    total += 256 * width + width * width  # time
    for block in range(depth):
        tokens = positions + (context_tokens if block >= context_start else 0)
        total += tokens * (4 * width * width + 3 * width * hidden) + 2 * tokens**2 * width
        total += 6 * width * width
    total += 2 * width * width + positions * width * channels * classes
    return 2 * total


@pytest.mark.parametrize("batch", [1, 3])
def test_forward_is_counted_matrix_by_matrix(batch):
    network = ClassRefiner(**SMALL)
    given = inputs(4, 3, batch)
    assert forward_flop(network, lambda copy: copy(*given)) == batch * expected_forward(**SMALL)


def test_training_costs_three_times_the_forward_pass_but_for_the_gradients_of_inputs():
    network = ClassRefiner(**SMALL)
    trained = training_flop(network, lambda copy: copy(*inputs(4, 3)))
    first_layers = 2 * (16 * 3 * 4 * 8 + 256 * 32)  # one-hots and sinusoids need no gradient
    assert trained == 3 * expected_forward(**SMALL) - first_layers


def test_the_reference_size_is_6_n_tokens_and_attention():
    with torch.device("meta"):
        network = ClassRefiner(
            channels=16, classes=16, num_labels=1000, size=16, depth=12, width=768, heads=12, bottleneck=128,
            context_start=4,
        )  # fmt: skip
    flop = training_flop(network, lambda copy: copy(*inputs(16, 16)))
    weights = sum(p.numel() for block in network.blocks for m in (block.attention, block.mlp) for p in m.parameters())
    tokens = (4 * 256 + 8 * 288) / 12
    attention = 12 * 768 * (4 * 256**2 + 8 * 288**2)
    assert flop == pytest.approx(6 * weights * tokens + attention, rel=0.02)


def test_a_hollow_copy_holds_no_data_and_leaves_the_original():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    network[2].weight = nn.Parameter(torch.randn(4, 4))
    network[0].requires_grad_(False)
    copy = hollow(network)
    assert all(tensor.is_meta for tensor in copy.state_dict().values())
    assert not any(tensor.is_meta for tensor in network.state_dict().values())
    assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in network.parameters()]


def test_a_compiled_network_is_counted_like_any_other():
    network = ClassRefiner(**SMALL)
    network.compile()
    assert forward_flop(network, lambda copy: copy(*inputs(4, 3))) == expected_forward(**SMALL)


def test_the_tokenizer_runs_without_data():
    tokenizer = HBQTokenizer(latent_channels=3, dim=8, decoder_dim=8, multipliers=(1, 2), temporal=(True,))
    pixels = torch.empty(1, 3, 1, 16, 16, device=META)
    encode = forward_flop(tokenizer, lambda copy: copy.encode(pixels))
    assert 0 < 3 * encode < training_flop(tokenizer, lambda copy: copy(pixels)[0])
