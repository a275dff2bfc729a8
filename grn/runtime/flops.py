"""Floating-point operations of a network, counted from its operators while it runs without data."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.fabric.utilities.throughput import measure_flops
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def hollow(module: Module) -> Module:
    """A copy of a module on the meta device: shapes and dtypes, no data; it costs no memory."""
    parameters = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    buffers = {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    return copy.deepcopy(module, parameters | buffers)  # deepcopy takes what it is told has been copied already


def forward_flop(module: Module, call: Callable[[Module], Tensor]) -> int:
    """FLOP of `call(module)`: of its matrix products, convolutions and attention; a multiplication and an addition are
    two. `call` gets a hollow copy and runs it on meta tensors."""
    network = hollow(module)
    with torch.no_grad():
        return measure_flops(network, lambda: call(network))


def training_flop(module: Module, call: Callable[[Module], Tensor]) -> int:
    """FLOP of `call(module)` and of its gradients, without what activation checkpointing would compute twice."""
    network = hollow(module)
    return measure_flops(network, lambda: call(network), lambda result: result.float().sum())
