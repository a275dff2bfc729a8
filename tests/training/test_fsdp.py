"""Two gloo processes: shards are of the very network that one process has, and it is whole only for evaluation."""

from types import SimpleNamespace

import commands
import pytest
import torch
import torch.distributed as dist
from sharding import meet, strategy
from torch.distributed.tensor import DTensor

from grn.method.corruption import token_loss
from grn.networks.class_refiner import ClassRefiner
from grn.runtime.errors import UserError
from grn.training.fsdp import FSDP, gather_weights, local, release_weights, shard_like

SIZES = {"channels": 3, "classes": 4, "num_labels": 5, "size": 4, "depth": 2, "width": 16, "heads": 2}
SIZES |= {"bottleneck": 8, "context_start": 1, "context_tokens": 2}


def inputs():
    tokens = torch.arange(96).view(2, 3, 1, 4, 4) % 4
    return tokens, torch.tensor([0.1, 0.8]), torch.tensor([2, 5])


def single():
    network = ClassRefiner(**SIZES)
    network.init_weights(torch.Generator().manual_seed(3))
    return network


def sharded(weights=None, **given):
    with torch.device("meta"):
        network = ClassRefiner(**SIZES)
    strategy(**given).shard(network, weights, seed=3)
    return network


def run_rank(rank, folder):
    meet(rank, folder)
    expected = single()
    state = expected.state_dict()

    network = sharded()
    for name, parameter in network.named_parameters():
        assert isinstance(parameter, DTensor)
        assert len(local(parameter)) <= -(-len(parameter) // 2)
        assert torch.equal(parameter.full_tensor(), state[name]), name
    for name, buffer in expected.named_buffers():
        assert torch.equal(network.get_buffer(name), buffer), name
    zeroed = {name: torch.zeros_like(weight) for name, weight in state.items()}
    assert not any(p.full_tensor().any() for p in sharded(zeroed).parameters())

    part = {"head.out.weight": zeroed["head.out.weight"] + 7}  # the rest starts as without it
    for name, parameter in sharded(part).named_parameters():
        assert torch.equal(parameter.full_tensor(), part.get(name, state[name])), name

    # Each rank alone, as often as it likes; then shards again.
    with torch.no_grad():
        expected.head.out.bias.fill_(0.5)
        bias = network.head.out.bias
        bias.copy_(shard_like(bias, expected.head.out.bias.detach()))
        gather_weights(network)
        for _ in range(rank + 1):
            torch.testing.assert_close(network(*inputs()), expected(*inputs()))
        release_weights(network)
    assert all(isinstance(p, DTensor) for p in network.parameters())
    dist.barrier()

    # Hybrid: every rank a copy of its own. In bfloat16, gradients arrive in float32.
    for shard_size, precision in ((2, "bf16-mixed"), (1, "32-true")):
        noise = torch.Generator().manual_seed(5)
        weights = {name: torch.randn(w.shape, generator=noise) / 10 for name, w in state.items()}
        network = sharded(weights, shard_size=shard_size, precision=precision)
        seen = []
        for part, linear in ((network.head, network.head.out), (network.blocks[0], network.blocks[0].mlp.out)):
            part.register_forward_pre_hook(lambda *_, linear=linear, seen=seen: seen.append(linear.weight.dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            logits = network(*inputs())
        assert seen == [torch.bfloat16 if precision == "bf16-mixed" else torch.float32, torch.float32]
        assert (logits != logits.bfloat16().float()).double().mean() > 0.9  # what no bf16 can hold
        logits.square().mean().backward()
        gradients = [p.grad for p in network.parameters()]
        assert all(g.dtype == torch.float32 for g in gradients)
        assert any(g.full_tensor().any() for g in gradients)
        # The loss in chunks, within the head's one gathering: the gradients of all logits at once.
        network.zero_grad()
        targets, found = 3 - inputs()[0], []
        for loss_chunk in (None, 16):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
                if loss_chunk is None:
                    loss = token_loss(network(*inputs()), targets)
                else:
                    loss = network(*inputs(), targets=targets, loss_chunk=loss_chunk)[0].mean()
            loss.backward()
            found.append([p.grad.full_tensor() for p in network.parameters()])
            network.zero_grad()
        for one, other in zip(*found):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-4)
        if shard_size == 1:
            assert all(len(local(p)) == len(p) for p in network.parameters())
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_hold_the_network_of_one(tmp_path):
    commands.spawn(run_rank, (tmp_path,), nprocs=2)


def test_mistakes_are_found_before_processes_start():
    made = FSDP(shard_size=3)
    made.parallel_devices = [torch.device("cpu")] * 4
    with pytest.raises(UserError, match=r"cluster\.strategy\.shard_size=3 does not divide the 4 ranks"):
        made.check(single())
    with pytest.raises(UserError, match="train it with cluster=ddp"):
        made.check(torch.nn.Linear(1, 1))
    made.shard_size = 2
    made.check(single())
    made.precision_plugin = SimpleNamespace(precision="16-mixed")
    with pytest.raises(UserError, match=r"cluster\.precision=16-mixed"):
        made.check(single())
