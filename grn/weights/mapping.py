"""Renames the parameters of a foreign checkpoint to ours, and back, by an explicit list of rules."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grn.runtime.errors import UserError


@dataclass(frozen=True)
class Rule:
    """One line of a mapping. To be readable backwards, too, it must keep in groups all that varies in a name.

    Args:
        official: a regular expression that must match a whole official parameter name; its groups are not nested.
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
        UserError: a name that no rule knows, or two names for one of ours.
    """
    patterns = [(re.compile(rule.official), rule) for rule in rules]
    renamed = {}
    for name, tensor in state.items():
        for pattern, rule in patterns:
            if match := pattern.fullmatch(name):
                if rule.ours is not None:
                    ours = match.expand(rule.ours)
                    if ours in renamed:
                        raise UserError(f"{source}: parameter {name!r} is one of two that mean our {ours}")
                    renamed[ours] = rule.convert(tensor) if rule.convert else tensor
                break
        else:
            raise UserError(f"{source}: parameter {name!r} is not of a known official checkpoint of this network")
    return renamed


def rename_back(state: dict[str, Tensor], rules: Iterable[Rule], *, source: str = "network") -> dict[str, Tensor]:
    """Our state dict -> the official one: what `rename` with the same rules turns into `state`.

    What rules drop does not come back.

    Raises:
        UserError: a name that no rule makes.
        ValueError: a rule that is not readable backwards.
    """
    patterns = [(*_backwards(rule, rule.ours), rule) for rule in rules if rule.ours is not None]
    renamed = {}
    for name, tensor in state.items():
        for pattern, official, rule in patterns:
            if match := pattern.fullmatch(name):
                renamed[match.expand(official)] = rule.revert(tensor) if rule.revert else tensor
                break
        else:
            raise UserError(f"{source}: parameter {name!r} has no name in official checkpoints of this network")
    return renamed


_GROUP = re.compile(r"(\((?:\?P<\w+>)?[^()]*\))")  # in Rule.official
_REFERENCE = re.compile(r"\\(?:(\d+)|g<(\w+)>)")  # to one of the groups, in Rule.ours


def _backwards(rule: Rule, ours: str) -> tuple[re.Pattern, str]:
    """(A pattern of our names, the template of the official name): groups and references change places."""
    if rule.convert and not rule.revert:
        raise ValueError(f"rule {rule.official} converts its tensor and does not say how to revert it")
    numbers = re.compile(rule.official).groupindex  # of the groups that have names
    groups, template = [], ""
    for piece in _GROUP.split(rule.official):
        if _GROUP.fullmatch(piece):
            groups.append(re.sub(r"^\((\?P<\w+>)?|\)$", "", piece))
            template += rf"\g<g{len(groups)}>"
        else:
            literal = re.sub(r"\\(\W)", r"\1", piece)
            if re.escape(literal) != piece:
                raise ValueError(
                    f"rule {rule.official} does not tell which of many official names {piece!r} stands for"
                )
            template += literal
    pattern, end = "", 0
    for reference in _REFERENCE.finditer(ours):
        number = int(reference[1] or numbers[reference[2]])
        pattern += re.escape(ours[end : reference.start()]) + f"(?P<g{number}>{groups[number - 1]})"
        end = reference.end()
    return re.compile(pattern + re.escape(ours[end:])), template


RIGHT_SIZES = "give the model.* sizes it was trained with"  # what mends most misfits


def load_strict(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    remedy: str = RIGHT_SIZES,
) -> None:
    """Loads `state` into `network`, every name and shape fitting.

    A network on the meta device takes the tensors of `state` themselves, others a copy.

    Raises:
        UserError: as in `check_state`.
    """
    check_state(network, state, source=source, remedy=remedy)
    with torch.no_grad():
        network.load_state_dict(state, assign=any(tensor.is_meta for tensor in network.state_dict().values()))


def check_state(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    remedy: str = RIGHT_SIZES,
) -> None:
    """Raises:
    UserError: `state` is not of this network; one line with the first misfit, how many there are, and the `remedy`. Or
        it is, and holds NaN or infinity.
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
            f"{source} is of another size than the model: {min(misfits)} ({len(misfits)} misfits in all); {remedy}"
        )
    check_finite(state, source=source)


def check_finite(state: Mapping[str, Tensor], *, source: str) -> None:
    """Raises:
    UserError: weights that are NaN or infinite, which no network can do anything with.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        if not torch.stack(tensor.detach().aminmax()).isfinite().all():
            raise UserError(
                f"{source}: the weights {name} are not finite (training diverged, or the file is damaged): take an "
                "earlier checkpoint"
            )
