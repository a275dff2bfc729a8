"""Overriding an option of an experiment drops what the experiment set for its own option.

`+experiment=digits_c2i sampler=linear` takes the digits' sampler, which is entropy-guided, out again, but Hydra merges
the experiment's keys over whatever option is chosen: a linear schedule would get the constants of the other one. So
it does where an experiment builds on another one and overrides an option of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.runtime.overrides import quote

EXPERIMENTS = ("experiment", "search")


def folders_of(config_dir: str | None, overrides: Sequence[str], config_name: str) -> list[Path]:
    """Folders of configs that the user added to ours: of `--config-dir`, then of `hydra.searchpath`, as Hydra has them.

    Raises:
        UserError: `hydra.searchpath` names something that is not there, of which Hydra only warns.
    """
    folders = [Path(config_dir).absolute()] if config_dir else []
    searched = [override for override in overrides if override.startswith("hydra.searchpath=")]
    if searched:
        places = OverridesParser.create().parse_override(searched[0]).value()
    else:
        found = [path for folder in (CONF, *folders) if (path := folder / f"{config_name}.yaml").is_file()]
        places = OmegaConf.select(OmegaConf.load(found[0]), "hydra.searchpath") if found else None
    if not isinstance(places, list | ListConfig):  # none, or what Hydra refuses
        return folders
    return [*folders, *(folder for place in places if (folder := folder_at(str(place))) is not None)]


def folder_at(place: str) -> Path | None:
    """None of places that are no folders, which plugins read."""
    scheme, _, path = place.rpartition("://")
    if scheme == "pkg":
        try:
            folder = resources.files(path.replace("/", ".").rstrip("."))
        except (ImportError, TypeError, ValueError):
            raise UserError(
                f"hydra.searchpath: there is no package {path}; is it installed, or in PYTHONPATH?"
            ) from None
        if not folder.joinpath("__init__.py").is_file():  # Hydra finds nothing there, either
            raise UserError(
                f"hydra.searchpath: {path} is no package without an __init__.py: add one, or give file://..."
            )
        return folder if isinstance(folder, Path) else None  # a package in an archive
    if scheme not in ("file", ""):
        return None
    if not Path(path).is_dir():
        raise UserError(f"hydra.searchpath: there is no folder {path}")
    return Path(path).absolute()


def outlived(arguments: Sequence[str], conf: Path, folders: Sequence[Path] = ()) -> list[str]:
    """Arguments (`~key`, `key=null`) that undo what an experiment set for an option that was replaced, by other
    arguments or by an experiment that builds on it.

    Keys that the other option has as well keep the experiment's values, e.g. the batch size beside other data; and keys
    that arguments, or experiments for the other option, set are left.

    Args:
        conf: the folder of configs, and `folders` those that the user added.
    """
    chosen = dict(argument.split("=", 1) for argument in arguments if "=" in argument and not argument.startswith("-"))
    set_here = {argument.partition("=")[0].lstrip("+~") for argument in arguments}
    folders = [conf, *folders]
    found: list[str] = []
    for group in EXPERIMENTS:
        layers = _layers(f"{group}/{chosen[f'+{group}']}", folders) if f"+{group}" in chosen else []
        for key in layers[-1].options if layers else ():
            option = chosen.get(key, layers[-1].options[key])
            if not _is_option(key, option, folders):
                continue
            for layer in layers:
                former, body = layer.options.get(key, option), layer.body.get(key)
                if not isinstance(body, dict):
                    continue
                if former == option:
                    set_here |= {".".join((key, *path)) for path in _paths(body)}
                else:
                    had, has = (_keys_of(key, it, folders) for it in (former, option))
                    found += _gone(body, had, has, (key,))
    return [
        argument for argument in dict.fromkeys(found) if not _is_among(argument.strip("~").partition("=")[0], set_here)
    ]


def _is_among(key: str, others: Iterable[str]) -> bool:
    """Whether it, or something under it, is there: who sets a key wants it."""
    return any(other == key or other.startswith(f"{key}.") for other in others)


class _Layer(NamedTuple):
    body: dict[str, Any]  # what an experiment sets
    options: dict[str, str]  # group -> the option it is set for, chosen there or in what it builds on


def _layers(name: str, folders: Sequence[Path]) -> list[_Layer]:
    """Of an experiment (`experiment/name`) and those that it builds on, which come first."""
    path = next((path for folder in folders if (path := folder / f"{name}.yaml").is_file()), None)
    if path is None:
        return []
    body: Any = OmegaConf.to_container(OmegaConf.load(path))
    layers: list[_Layer] = []
    above: dict[str, str] = {}
    options: dict[str, str] = {}
    for default in (body or {}).pop("defaults", []):
        if isinstance(default, dict):  # override /group: option
            ((key, option),) = default.items()
            options[key.split()[-1].strip("/")] = str(option)
            continue
        base = default[1:] if default.startswith("/") else f"{name.rpartition('/')[0]}/{default}"
        if base.startswith(tuple(f"{group}/" for group in EXPERIMENTS)):
            layers += (bases := _layers(base, folders))
            above |= bases[-1].options if bases else {}
    return [*layers, _Layer(body or {}, above | options)]


def _paths(body: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in body.items():
        yield from ((key, *path) for path in _paths(value)) if isinstance(value, dict) and value else ((key,),)


def _is_option(group: str, name: str, folders: Sequence[Path]) -> bool:
    return any((folder / group / f"{name}.yaml").is_file() for folder in folders)


def _keys_of(group: str, option: str, folders: Sequence[Path]) -> DictConfig:
    """An option of a group, with what it is built on."""
    running = GlobalHydra.instance().is_initialized()  # a sweep's point, say
    with nullcontext() if running else initialize_config_dir(str(folders[0]), version_base="1.3"):
        return OmegaConf.select(compose(f"{group}/{option}", searchpath(folders[1:])), group)


def searchpath(folders: Sequence[Path]) -> list[str]:
    """The override by which Hydra finds configs in these, too."""
    return (
        [f"hydra.searchpath=[{','.join(quote(f'file://{folder}', 'path') for folder in folders)}]"] if folders else []
    )


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
