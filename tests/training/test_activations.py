import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from grn.networks.class_refiner import ClassRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError
from grn.training.activations import checkpoint_activations


def build():
    torch.manual_seed(0)
    network = ClassRefiner(
        channels=3, classes=4, num_labels=5, size=8, depth=3, width=32, heads=2, bottleneck=8, context_start=1
    )
    for parameter in network.parameters():  # beyond adaLN-zero, or the blocks are not felt
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def gradients(network):
    """(Of every parameter by name, FLOP, bytes kept for the backward pass outside of what checkpoints keep)."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, (2, 3, 1, 8, 8), generator=generator)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as flop:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = network(tokens, torch.tensor([0.2, 0.7]), torch.tensor([1, 5])).square().mean()
        loss.backward()
    return {name: p.grad for name, p in network.named_parameters()}, flop.get_total_flops(), sum(kept.values())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_stay_and_less_is_kept(mode, compiled):
    expected, flop, plain = gradients(build())
    network = build()
    checkpoint_activations(network, mode)
    if compiled:
        for block in network.blocks:
            block.compile()
    found, flop_now, kept = gradients(network)
    assert network.state_dict().keys() == build().state_dict().keys()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    if not compiled:  # which these do not see into
        assert kept < 0.4 * plain
        assert (flop_now == flop) if mode == "selective" else (1.2 * flop < flop_now < 4 / 3 * flop)


def test_mistakes_name_the_key():
    with pytest.raises(UserError, match=r"cluster\.activation_checkpointing must be one of none, selective, full"):
        checkpoint_activations(build(), "some")
    tokenizer = HBQTokenizer(latent_channels=3, rounds=2, dim=8, decoder_dim=8)
    with pytest.raises(UserError, match="for refiners"):
        checkpoint_activations(tokenizer, "full")
    checkpoint_activations(tokenizer, "none")
