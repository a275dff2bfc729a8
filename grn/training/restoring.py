"""Checks restored states against the model and optimizer they are restored into.

The fused kernels of optimizers trust the shapes and types of their state: a state of another shape writes beyond it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grn.runtime.errors import UserError

REMEDY = "the file is damaged or foreign; take another checkpoint by ckpt_path=..., or leave ckpt_path out"
MOMENTS = ("exp_avg", "exp_avg_sq")


def check_weights(own: Mapping[str, Tensor], restored: Any, what: str) -> None:
    """Raises:
    UserError: `restored` lacks a tensor, or has one of another shape, or of another kind of numbers, than `own`.
    """
    if not isinstance(restored, Mapping):
        raise UserError(f"ckpt_path: {what} are not named tensors; {REMEDY}")
    for name, tensor in own.items():
        _check_like(tensor, restored.get(name), f"{what}: {name}")
    if odd := restored.keys() - own.keys():
        raise UserError(f"ckpt_path: {what}: {min(map(str, odd))} is not of this model; {REMEDY}")


def check_count_of_states(checkpoint: Mapping[str, Any], count: int) -> None:
    """Raises:
    UserError: the checkpoint does not have the state of so many optimizers, and of a schedule for each.
    """
    for name, what in (("optimizer_states", "optimizers"), ("lr_schedulers", "schedules")):
        states = checkpoint.get(name)
        if not isinstance(states, list) or len(states) != count:
            found = len(states) if isinstance(states, list) else "no"
            raise UserError(f"ckpt_path: the file has {found} states of {what}, this run has {count}; {REMEDY}")


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Raises:
    UserError: `state` is no state dict of an AdamW over these parameters: groups, names, shapes, types.
    """
    what = "the optimizer's state"
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    moments = state.get("state") if isinstance(state, Mapping) else None
    own = [len(group["params"]) for group in optimizer.param_groups]
    numbers = [group.get("params") if isinstance(group, Mapping) else None for group in groups or ()]
    if [len(found) if isinstance(found, list) else None for found in numbers] != own:
        raise UserError(f"ckpt_path: {what} is not of {sum(own)} parameters in {len(own)} groups; {REMEDY}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = [number for found in numbers for number in found or ()]
    if not isinstance(moments, Mapping) or places != list(range(len(parameters))) or moments.keys() - set(places):
        raise UserError(f"ckpt_path: {what} is of other parameters than the model's; {REMEDY}")
    for number, values in moments.items():
        place = f"{what}: parameter {number}"
        if not isinstance(values, Mapping) or values.keys() != {"step", *MOMENTS}:
            raise UserError(f"ckpt_path: {place} does not have step, {' and '.join(MOMENTS)}; {REMEDY}")
        _check_like(torch.zeros((), dtype=torch.float32), values["step"], f"{place}, step")
        if not 0 <= float(values["step"]) < 2**53:
            raise UserError(f"ckpt_path: {place}, step is {float(values['step'])}; {REMEDY}")
        for name in MOMENTS:
            _check_like(parameters[number], values[name], f"{place}, {name}")


def _check_like(own: Tensor, restored: Any, what: str) -> None:
    if not isinstance(restored, Tensor) or restored.layout is not torch.strided:
        raise UserError(f"ckpt_path: {what} is not a tensor in the file; {REMEDY}")
    if restored.shape != own.shape:
        raise UserError(f"ckpt_path: {what} is {tuple(restored.shape)} in the file, {tuple(own.shape)} here; {REMEDY}")
    if restored.is_floating_point() != own.is_floating_point():
        raise UserError(f"ckpt_path: {what} is {restored.dtype} in the file, {own.dtype} here; {REMEDY}")
