"""Renames the parameters of a foreign checkpoint to ours by an explicit list of rules (no renaming inside modules)."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grn.errors import UserError


@dataclass(frozen=True)
class Rule:
    """One line of a mapping.

    Args:
        official: a regular expression that must match a whole official parameter name.
        ours: our name, with the groups of `official` as `\\1`, `\\2`, ...; None drops the parameter (a fixed buffer).
        convert: official tensor -> our tensor, where the layout differs (a transposed matrix, a squeezed kernel).
        revert: our tensor -> official tensor, for export; needed where `convert` is given.
    """

    official: str
    ours: str | None
    convert: Callable[[Tensor], Tensor] | None = None
    revert: Callable[[Tensor], Tensor] | None = None


def rename(state: dict[str, Tensor], rules: Iterable[Rule], *, source: str = "checkpoint") -> dict[str, Tensor]:
    """Official state dict -> ours; the first rule that matches a name decides.

    Raises:
        UserError: a name that no rule knows.
    """
    rules = [(re.compile(rule.official), rule) for rule in rules]
    renamed = {}
    for name, tensor in state.items():
        for pattern, rule in rules:
            if match := pattern.fullmatch(name):
                if rule.ours is not None:
                    renamed[match.expand(rule.ours)] = rule.convert(tensor) if rule.convert else tensor
                break
        else:
            raise UserError(f"{source}: parameter {name!r} is not of a known official checkpoint of this network")
    return renamed


def load_strict(network: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Loads `state` into `network`, every name and shape fitting.

    Raises:
        UserError: one line with the first misfit, how many there are, and what to check.
    """
    own = network.state_dict()
    misfits = [f"{name} is missing" for name in own.keys() - state.keys()]
    misfits += [f"{name} is not a parameter of the model" for name in state.keys() - own.keys()]
    misfits += [
        f"{name} is {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if misfits:
        raise UserError(
            f"{source} is of another size than the model: {min(misfits)} ({len(misfits)} misfits in all); "
            "give the model.* sizes it was trained with"
        )
    with torch.no_grad():
        network.load_state_dict(state)
