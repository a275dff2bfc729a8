"""Fully sharded training (FSDP2): every rank holds a part of weights, averages, gradients and optimizer state.

A network is sharded block by block, so it has `blocks`, an `nn.ModuleList`, a `head`, and `initializers`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor, empty
from torch.optim import Optimizer

from grn.checkpoints.sharded import read_either, write_sharded
from grn.runtime.errors import UserError
from grn.training.checkpoint_io import finish
from grn.training.restoring import check_optimizer_state


class FSDP(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with checkpoints that any other number of ranks or strategy can go on from.

    Under `precision=bf16-mixed` weights travel in bfloat16, except those of the head, which computes in float32;
    gradients are reduced in float32, and the shards that the optimizer sees stay float32.

    Args:
        shard_size: ranks that share one copy of the network; None: all. A smaller number (hybrid sharding, say the
            GPUs of a node) keeps weights from traveling between nodes, for the memory of a copy on each.

    """

    def __init__(self, shard_size: int | None = None, **arguments: Any):
        super().__init__(**arguments)
        self.shard_size = shard_size

    # --- ranks --------------------------------------------------------------------------------------------------------

    def check(self, network: nn.Module) -> None:
        """Before any process is started.

        Raises:
            UserError: `shard_size` does not divide the number of ranks, or such a network or precision cannot be
                sharded.
        """
        if not hasattr(network, "initializers"):
            raise UserError("cluster=fsdp shards refiners; a tokenizer fits any GPU: train it with cluster=ddp")
        if (precision := self.precision_plugin.precision) not in ("32-true", "bf16-mixed"):
            raise UserError(f"cluster.precision={precision} does not go with cluster=fsdp: bf16-mixed or 32-true does")
        ranks = self.num_nodes * self.num_processes
        if self.shard_size is not None and (self.shard_size < 1 or ranks % self.shard_size):
            raise UserError(f"cluster.strategy.shard_size={self.shard_size} does not divide the {ranks} ranks")

    def setup_environment(self) -> None:
        ranks = self.num_nodes * self.num_processes
        # The mesh's dimensions, by Lightning's names; the ranks of a copy are neighbors.
        self._tensor_parallel_size = self.shard_size or ranks
        self._data_parallel_size = ranks // self._tensor_parallel_size
        super().setup_environment()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    # --- the network --------------------------------------------------------------------------------------------------

    def shard(self, network: Any, weights: Mapping[str, Tensor] | None = None, *, seed: int = 0) -> None:
        """Shards a network that is on the meta device and gives it `weights`, or its first ones: never whole anywhere.

        Args:
            weights: whole, by name; what they leave out has the values of `network.initializers` with this seed, as on
                any number of ranks.
        """
        bf16 = self.precision_plugin.precision == "bf16-mixed"
        mesh: Any = self.device_mesh
        exact = MixedPrecisionPolicy(
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # autocast does, where it is safe; not of signal ratios and positions
        )
        policy = replace(exact, param_dtype=torch.bfloat16 if bf16 else None)
        # Hybrid sharding is what two dimensions mean. The root is resharded after forward, too, so that weights are
        # shards whenever somebody looks at them between two steps.
        arguments: dict[str, Any] = {
            "mesh": mesh if mesh.size(0) > 1 else mesh[mesh.mesh_dim_names[1]],
            "reshard_after_forward": True,
        }
        for block in network.blocks:
            fully_shard(block, mp_policy=policy, **arguments)
        fully_shard(network.head, mp_policy=exact, **arguments)
        fully_shard(network, mp_policy=policy, **arguments)
        network.to_empty(device=self.root_device)
        with torch.no_grad():
            for tensor, fill in network.initializers(torch.Generator().manual_seed(seed)):
                whole = torch.empty(tensor.shape, dtype=tensor.dtype)
                fill(whole)
                tensor.copy_(shard_like(tensor, whole))
            own = network.state_dict()
            for name, whole in (weights or {}).items():
                own[name].copy_(shard_like(own[name], whole))

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # the network is sharded before: in `configure_model`

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    @property
    def _trained(self) -> LightningModule:
        assert self.lightning_module is not None  # the trainer has connected it
        return self.lightning_module

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._trained.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return getattr(optimizer, "optimizer", optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        finish()
        write_sharded(checkpoint, Path(self.broadcast(filepath)))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint with DTensors out of a folder, or with whole tensors, mapped, out of a single file."""
        path = Path(self.broadcast(checkpoint_path))
        like = next(p for p in self._trained.parameters() if isinstance(p, DTensor))
        placed = {"device_mesh": like.device_mesh, "placements": like.placements}
        return read_either(
            path,
            f"ckpt_path: {path} cannot be read as a checkpoint",
            mmap=True,
            empty=lambda shape, dtype: empty(shape, dtype=dtype, **placed),
        )

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self._trained.state_dict()
        state = {name: shard_like(own[name], value) for name, value in checkpoint["state_dict"].items()}
        self._trained.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            check_optimizer_state(optimizer, state)
            parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
            sharded = {
                number: {
                    name: shard_like(parameters[number], value) if name != "step" else value
                    for name, value in values.items()
                }
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": sharded})


def shard_like(reference: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, as shards like those of `reference`; nothing is sent between ranks."""
    if not isinstance(reference, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_weights(network: nn.Module) -> None:
    """Keeps the whole network on every rank until `release_weights`, for evaluation: each can run it as often as it
    likes, without waiting for others. Every rank must call it. Nothing happens to a network that is not sharded."""
    for module in _sharded(network):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


def release_weights(network: nn.Module) -> None:
    """Back to shards alone; what was done to the whole weights meanwhile is lost."""
    for module in _sharded(network):
        module.reshard()
        module.set_reshard_after_forward(True, recurse=False)


def _sharded(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]
