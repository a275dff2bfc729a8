"""Two gloo processes: shards are of the very network that one process has, and it is whole only for evaluation."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from grn.errors import UserError
from grn.networks.class_refiner import ClassRefiner
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


def strategy(mesh, precision="32-true"):
    made = FSDP()
    made._device_mesh = mesh
    made.parallel_devices = [torch.device("cpu")]
    made.cluster_environment = SimpleNamespace(local_rank=lambda: 0)
    made.precision_plugin = SimpleNamespace(precision=precision)
    return made


def sharded(mesh, weights=None, precision="32-true"):
    with torch.device("meta"):
        network = ClassRefiner(**SIZES)
    strategy(mesh, precision).shard(network, weights, seed=3)
    return network


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    expected = single()
    state = expected.state_dict()

    network = sharded(mesh)
    for name, parameter in network.named_parameters():
        assert isinstance(parameter, DTensor)
        assert len(local(parameter)) <= -(-len(parameter) // 2)
        assert torch.equal(parameter.full_tensor(), state[name]), name
    for name, buffer in expected.named_buffers():
        assert torch.equal(network.get_buffer(name), buffer), name
    zeroed = {name: torch.zeros_like(weight) for name, weight in state.items()}
    assert not any(p.full_tensor().any() for p in sharded(mesh, zeroed).parameters())

    part = {"head.out.weight": zeroed["head.out.weight"] + 7}  # the rest starts as without it
    for name, parameter in sharded(mesh, part).named_parameters():
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
    pairs = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    for copies, precision in ((mesh, "bf16-mixed"), (pairs, "32-true")):
        network = sharded(copies, {name: torch.full_like(w, 0.01) for name, w in state.items()}, precision)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            network(*inputs()).square().mean().backward()
        gradients = [p.grad for p in network.parameters()]
        assert all(g.dtype == torch.float32 for g in gradients)
        assert any(g.full_tensor().any() for g in gradients)
        if copies is pairs:
            assert all(len(local(p)) == len(p) for p in network.parameters())
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_hold_the_network_of_one(tmp_path):
    torch.multiprocessing.spawn(run_rank, (tmp_path,), nprocs=2)


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
