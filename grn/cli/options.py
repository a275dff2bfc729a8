"""Overriding an option of an experiment drops what the experiment set for its own option.

`+experiment=digits_c2i sampler=linear` takes the digits' sampler, which is entropy-guided, out again, but Hydra merges
the experiment's keys over whatever option is chosen: a linear schedule would get the constants of the other one.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

EXPERIMENTS = ("experiment", "search")


def outlived(arguments: Sequence[str], conf: Path, folders: Sequence[Path] = ()) -> list[str]:
    """Arguments (`~key`, `key=null`) that undo what an experiment set for an option that other arguments replace.

    Keys that the other option has as well keep the experiment's values, e.g. the batch size beside other data; and keys
    that arguments set are left.

    Args:
        conf: the folder of configs, and `folders` those that the user added.
    """
    chosen = dict(argument.split("=", 1) for argument in arguments if "=" in argument and not argument.startswith("-"))
    found: list[str] = []
    for group in EXPERIMENTS:
        name = chosen.get(f"+{group}")
        body, options = ({}, {}) if name is None else _experiment(name, group, [*folders, conf])
        for key in options.keys() & chosen.keys() & body.keys():
            former, option = options[key], chosen[key]
            if option == former or not isinstance(body[key], dict) or not _is_option(key, option, [*folders, conf]):
                continue
            had, has = (_keys_of(key, it, conf, folders) for it in (former, option))
            found += _gone(body[key], had, has, (key,))
    set_here = {argument.partition("=")[0].lstrip("+~") for argument in arguments}
    return [argument for argument in found if not _is_among(argument.strip("~").partition("=")[0], set_here)]


def _is_among(key: str, others: Iterable[str]) -> bool:
    """Whether it, or something under it, is there: who sets a key wants it."""
    return any(other == key or other.startswith(f"{key}.") for other in others)


def _experiment(name: str, group: str, folders: Sequence[Path]) -> tuple[dict[str, Any], dict[str, str]]:
    """(What an experiment and those that it builds on set; group -> the option they chose)."""
    path = next((path for folder in folders if (path := folder / group / f"{name}.yaml").is_file()), None)
    if path is None:
        return {}, {}
    own: Any = OmegaConf.to_container(OmegaConf.load(path))
    body: Any = {}
    options: dict[str, str] = {}
    for default in own.pop("defaults", []):
        if isinstance(default, str) and default != "_self_":
            base, of_base = _experiment(default.rpartition("/")[2], group, folders)
            body, options = OmegaConf.to_container(OmegaConf.merge(body, base)), options | of_base
        elif isinstance(default, dict):
            for key, option in default.items():
                options[key.removeprefix("override ").strip("/ ")] = option
    body = OmegaConf.to_container(OmegaConf.merge(body, own))
    return body, options


def _is_option(group: str, name: str, folders: Sequence[Path]) -> bool:
    return any((folder / group / f"{name}.yaml").is_file() for folder in folders)


def _keys_of(group: str, option: str, conf: Path, folders: Sequence[Path]) -> DictConfig:
    """An option of a group, with what it is built on."""
    running = GlobalHydra.instance().is_initialized()  # a sweep's point, say
    with nullcontext() if running else initialize_config_dir(str(conf), version_base="1.3"):
        searchpath = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders)}]"] if folders else []
        return OmegaConf.select(compose(f"{group}/{option}", searchpath), group)


def _gone(body: dict[str, Any], had: Any, has: Any, above: tuple[str, ...]) -> Iterator[str]:
    """The same, of keys that an experiment set, its own option had, and the other one has not."""
    for key, value in body.items():
        of_former, of_other = _child(had, key), _child(has, key)
        name = ".".join((*above, key))
        if of_former is None or value is None:
            continue
        if of_other is None:
            yield f"~{name}"
        elif isinstance(value, dict) and of_other._is_none():
            yield f"{name}=null"
        elif isinstance(value, dict):
            yield from _gone(value, of_former, of_other, (*above, key))


def _child(node: Any, key: str) -> Any:
    there = isinstance(node, DictConfig) and not node._is_none() and key in list(node)
    return node._get_node(key) if there else None
