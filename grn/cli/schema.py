"""A config against the signatures of what it builds: their keys, and the types of its values."""

import difflib
from collections.abc import Iterator
from functools import cache
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grn.checkpoints.trust import GROUPS, SPECIAL, arguments
from grn.runtime.errors import UserError

LISTED = ("callbacks", "logger")  # of which every key is built
TYPED = ("grn.", "lightning.")  # packages whose annotations say what they take


def check_settings(config: DictConfig) -> None:
    """Checks all that a config may build, before anything is built; what is not known yet is left out.

    Raises:
        UserError: a key that its target does not take, or a value that is not of the type of the target's annotation.
    """
    for name, value in _items(config):
        for key, part in _items(value) if name in LISTED else ():
            if part and not (isinstance(part, DictConfig) and "_target_" in part):
                raise UserError(f"{name}.{key}={part} must say what is built, _target_: ..., or be null")
        _check(value, name)


def _check(node: Any, place: str) -> None:
    if isinstance(node, ListConfig):
        for number, value in enumerate(node):
            _check(value, f"{place}[{number}]")
    if not isinstance(node, DictConfig):
        return
    target = str(node.get("_target_", ""))
    taken, takes_others = _arguments(target) if target else ({}, True)
    extra = _extra(place, target)
    for key, value in _items(node):
        if key not in taken and key not in extra and key not in SPECIAL and not takes_others:
            near = difflib.get_close_matches(key, [*taken, *extra])
            raise UserError(
                f"{place}.{key}: {target} takes no such key"
                + (f"; is {' or '.join(near)} meant?" if near else ": leave it out")
            )
        unset = value is None and place.partition(".")[0] == "sampler"  # whose null leaves it to the checkpoint
        if key in taken and target.startswith(TYPED) and not unset and not _builds(value):
            _check_type(value, taken[key], f"{place}.{key}")
        _check(value, f"{place}.{key}")


def _arguments(target: str) -> tuple[dict[str, Any], bool]:
    try:
        return arguments(target)
    except (ImportError, HydraException, ValueError):  # nothing of that name, as who builds it says; or a builtin
        return {}, True


def _extra(place: str, target: str) -> tuple[str, ...]:
    """Keys that the target does not take, but GRN reads."""
    if place in GROUPS:
        return GROUPS[place].extra
    if place == "benchmark":
        return ("name",)
    return ("weights",) if target.startswith("grn.networks.") else ()


def _items(node: DictConfig) -> Iterator[tuple[str, Any]]:
    for key in node:
        try:
            value = node[key]
        except OmegaConfBaseException:  # what it refers to is filled in later, or said by who needs it
            continue
        yield str(key), value


def _builds(value: Any) -> bool:
    """Whether something is built of it, or of a part of it."""
    if isinstance(value, DictConfig):
        return "_target_" in value or any(_builds(part) for _, part in _items(value))
    return isinstance(value, ListConfig) and any(map(_builds, value))


def _check_type(value: Any, annotation: Any, key: str) -> None:
    from pydantic import ValidationError

    adapter = _adapter(annotation)
    if adapter is None or annotation is DictConfig:
        return
    try:
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        adapter.validate_python(plain, strict=isinstance(plain, bool) or None)  # else true is a number
    except OmegaConfBaseException:  # as in `_items`
        return
    except ValidationError as error:
        said = dict.fromkeys(each["msg"].replace("Input should", "it must") for each in error.errors(include_url=False))
        raise UserError(f"{key}={value}: {', or '.join(said)}") from None


@cache
def _adapter(annotation: Any) -> Any:
    """None where pydantic knows nothing to check of it."""
    from pydantic import ConfigDict, TypeAdapter
    from pydantic.errors import PydanticUserError
    from pydantic_core import SchemaError

    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, SchemaError):  # of protocols
        return None
