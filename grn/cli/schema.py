"""A config against the signatures of what it builds: their keys, and the types of its values."""

import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from inspect import signature
from typing import Any, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grn.checkpoints.trust import GROUPS, SPECIAL, arguments
from grn.runtime.errors import UserError
from grn.runtime.near_misses import near_misses

LISTED = ("callbacks", "logger")  # of which every key is built
OURS = ("grn.", "lightning.")  # packages whose annotations say what they take
OWN_CHECKS = ("missing", "too_short", "too_long")  # of pydantic's errors: numbers of values, which classes tell better

UNSAID = ("path_type", "callable_type")  # which name Python's classes


def check_settings(config: DictConfig) -> None:
    """Checks all that a config may build, before anything is built.

    What refers to other values is left out: they are checked where they stand, or not known yet.

    Raises:
        UserError: a key that its target does not take, or a value that is not of the type of the target's annotation.
    """
    for name, value in _items(config):
        for key, part in _items(value) if name in LISTED and isinstance(value, DictConfig) else ():
            if part and not (isinstance(part, DictConfig) and "_target_" in part):
                raise UserError(f"{name}.{key}={part} must say what is built, _target_: ..., or be null")
        _check(value, name)


def _check(node: Any, place: str) -> None:
    if isinstance(node, ListConfig):
        for number, value in _items(node):
            _check(value, f"{place}[{number}]")
    if not isinstance(node, DictConfig):
        return
    target = str(node.get("_target_", ""))
    taken, takes_others = _taken(place, target) if target else ({}, True)
    written: Any = OmegaConf.to_container(node, resolve=False)
    for key, value in _items(node):
        if key not in taken and key not in SPECIAL and not takes_others:
            near = near_misses(key, OmegaConf.create(dict.fromkeys(taken)))
            raise UserError(
                f"{place}.{key}: {target} takes no such key"
                + (f"; is {' or '.join(near)} meant?" if near else ": leave it out")
            )
        refers = "${" in str(written.get(key))
        unset = value is None and place.partition(".")[0] == "sampler"  # whose null leaves it to the checkpoint
        if key in taken and target.startswith(OURS) and not unset and not refers and not _builds(value):
            _check_type(value, taken[key], f"{place}.{key}")
        if not isinstance(written.get(key), str):
            _check(value, f"{place}.{key}")


def _taken(place: str, target: str) -> tuple[dict[str, Any], bool]:
    """What a target takes at this place, what GRN reads there itself included: (types by name, whether others, too)."""
    try:
        found: Any = pkgutil.resolve_name(target)
        taken, others = _typed(found)
        if not target.startswith(OURS):  # what becomes of its **arguments is not known
            others |= any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature(found).parameters.values())
    except (ImportError, AttributeError, TypeError, ValueError):  # as who builds it says; or a builtin
        return {}, True
    if place == "training":
        taken |= _of_bundle(found)
    elif place == "benchmark":
        taken |= {"name": str}
    elif place in GROUPS:
        taken |= dict.fromkeys(GROUPS[place].extra, Any)
    elif target.startswith("grn.networks."):
        taken |= {"weights": Any}
    given = GROUPS[place].given if place in GROUPS else ()
    return {name: annotation for name, annotation in taken.items() if name not in given}, others


def _typed(found: Any) -> tuple[dict[str, Any], bool]:
    """As `arguments`, with the annotations in place of the functions that have them."""
    makers, others = arguments(found)
    return {name: _hints(maker).get(name, Any) for name, maker in makers.items()}, others


@cache
def _hints(maker: Callable) -> dict[str, Any]:
    try:
        return get_type_hints(maker)
    except Exception:  # names that only type checkers see, or whatever somebody's annotations are
        return {}


def _of_bundle(module: Any) -> dict[str, Any]:
    """What the config of a refiner's training says of its bundle (`grn.sampling.loading.bundle_from_config`)."""
    from grn.sampling.bundle import RefinerBundle
    from grn.sampling.text_bundle import TextRefinerBundle
    from grn.training import RefinerModule, TextRefinerModule

    if not issubclass(module, RefinerModule):
        return {}
    bundle = TextRefinerBundle if issubclass(module, TextRefinerModule) else RefinerBundle
    taken, _ = _typed(bundle)
    return {name: taken[name] for name in bundle.settings} | {"adapters": Any}


def _items(node: DictConfig | ListConfig) -> Iterator[tuple[str, Any]]:
    keys: Any = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        try:
            value = node[key]
        except OmegaConfBaseException:  # what it refers to is filled in later, or said by who needs it
            continue
        yield str(key), value


def _builds(value: Any) -> bool:
    """Whether something is built of it, or of a part of it."""
    if isinstance(value, DictConfig):
        return "_target_" in value or any(_builds(part) for _, part in _items(value))
    return isinstance(value, ListConfig) and any(_builds(part) for _, part in _items(value))


def _check_type(value: Any, annotation: Any, key: str) -> None:
    from pydantic import ValidationError

    adapter = _adapter(annotation)
    if adapter is None or annotation is DictConfig:
        return
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    try:
        adapter.validate_python(plain, strict=isinstance(plain, bool | float) or None)  # else they are whole numbers
    except ValidationError as error:
        found = [each for each in error.errors(include_url=False) if each["type"] not in OWN_CHECKS]
        said = [each["msg"].replace("Input should", "it must") for each in found if each["type"] not in UNSAID]
        if found:
            raise UserError(f"{key}={value}: {', or '.join(dict.fromkeys(said)) or 'it must be a path'}") from None


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
