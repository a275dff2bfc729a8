"""Norms of gradients, weights and activations, block by block."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from grn.runtime.errors import UserError, check_count
from grn.runtime.trainer import Trainer
from grn.training import AnyModule

BINS = 64


class LogNorms(Callback):
    """Logs `norms/gradient/<block>`, `norms/weight/<block>` (2-norms) and `norms/activation/<block>` (root mean square
    of the block's output) of the network that trains, in float32; before gradients are clipped.

    A block is each member of a list of modules, else each part of the network. Only steps that are logged wait for the
    device. Of a compiled network there are no activations: its blocks are parts of one graph.

    Args:
        every_n_steps: optimizer steps from one to the next; 0: off.
        histograms: the distributions of gradients and weights go to W&B, too.

    Raises:
        UserError: histograms of a sharded network, of which no process has all.
    """

    def __init__(self, *, every_n_steps: int = 0, histograms: bool = False):
        check_count("callbacks.norms.every_n_steps", every_n_steps, least=0)
        self.every, self.histograms = every_n_steps, histograms
        self._blocks: dict[str, nn.Module] = {}
        self._activations: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._measures = False

    def on_train_start(self, trainer: Trainer, pl_module: AnyModule) -> None:
        if not self.every:
            return
        network = pl_module.network
        self._blocks = dict(blocks(network))
        if self.histograms and any(isinstance(parameter, DTensor) for parameter in network.parameters()):
            raise UserError("callbacks.norms.histograms are not of sharded networks: leave them out")
        if any(module._compiled_call_impl is not None for module in network.modules()):
            return
        for name, block in self._blocks.items():
            self._hooks.append(block.register_forward_hook(lambda *_, name=name: self._keep(name, _[-1])))

    def on_train_batch_start(self, trainer: Trainer, pl_module: AnyModule, batch: Any, batch_idx: int) -> None:
        self._measures = bool(self.every) and trainer.global_step % self.every == 0

    def _keep(self, name: str, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if self._measures and isinstance(output, Tensor) and torch.is_grad_enabled():
            self._activations[name] = output.detach().float().square().mean().sqrt()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: AnyModule, optimizer: Optimizer) -> None:
        if not self._measures:
            return
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        found, shown = {f"norms/activation/{name}": value for name, value in self._activations.items()}, {}
        self._activations = {}
        for name, block in self._blocks.items():
            parameters = [it for it in block.parameters() if id(it) in stepped and it.grad is not None]
            if not parameters:
                continue
            parts = {"gradient": [it.grad for it in parameters], "weight": [it.detach() for it in parameters]}
            for kind, tensors in parts.items():
                found[f"norms/{kind}/{name}"] = _norm(tensors)
                if self.histograms:
                    shown[f"norms/{kind}_histogram/{name}"] = _histogram(tensors)
        values = {name: float(value) for name, value in found.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
            if shown and isinstance(logger, WandbLogger):
                import wandb  # such a logger has it already

                pictures: dict[str, Any] = {name: wandb.Histogram(np_histogram=it) for name, it in shown.items()}
                logger.log_metrics(pictures, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: AnyModule) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def blocks(network: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The members of the outermost lists of modules, and else the parts, by their names."""
    for name, part in network.named_children():
        if isinstance(part, nn.ModuleList):
            yield from ((f"{name}.{number}", block) for number, block in enumerate(part))
        elif any(isinstance(it, nn.ModuleList) for it in part.modules()):
            yield from ((f"{name}.{inner}", block) for inner, block in blocks(part))
        elif any(True for _ in part.parameters()):
            yield name, part


def _norm(tensors: list[Tensor]) -> Tensor:
    total = functools.reduce(torch.add, (torch.linalg.vector_norm(it.float()).square() for it in tensors))
    return (total.full_tensor() if isinstance(total, DTensor) else total).sqrt()


def _histogram(tensors: list[Tensor]) -> tuple[Any, Any]:
    counts, edges = torch.histogram(torch.cat([it.float().flatten() for it in tensors]).cpu(), bins=BINS)
    return counts.numpy(), edges.numpy()
