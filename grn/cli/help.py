"""`--help`: what a command does, examples, its config groups, and its keys with the comments that stand in the YAML.

`--help-all` shows all groups, the keys of every chosen option, and the config that they come to.
"""

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from grn.cli.checks import is_for
from grn.cli.options import searchpath
from grn.runtime.config_folder import own_groups

# What is added to a config, +experiment=..., and is no part of it otherwise.
ADDED = {"train": ("experiment", "debug", "search"), "evaluate": ("search",)}
PATHS = "paths"  # a group of one option, whose keys every command has


def page(
    config_name: str, overrides: Sequence[str], conf: Path, folders: Sequence[Path] = (), *, every: bool = False
) -> str:
    """The text; `folders` of configs beside `conf`. (Hydra's own `--help` composes the config a hundred times.)"""
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = compose(config_name, [*searchpath(folders), *overrides], return_hydra_config=True)
        chosen = {
            group: option
            for group, option in reversed(config.hydra.runtime.choices.items())
            if group != PATHS and not group.startswith(("hydra/", "cli"))
        }
    own = own_groups(conf / f"{config_name}.yaml")
    names = [*(f"+{group}" for group in ADDED.get(config_name, ())), *(g for g in chosen if every or g in own)]
    groups = {name: _options(name.lstrip("+").partition("@")[0], (conf, *folders)) for name in names}
    header, footer = config.hydra.help.header, config.hydra.help.footer
    lines = [header.strip()]
    if "cluster" in groups:  # each command takes some of them (`grn.cli.checks.check_cluster`)
        groups["cluster"] = [it for it in groups["cluster"] if is_for(it, config_name)]
    if shown := [f"{name}: {', '.join(options)}" for name, options in groups.items() if options]:
        lines += ["", "== Groups (group=option) ==", *shown]
    lines += ["", "== Keys (key=value) ==", *_keys(conf / f"{config_name}.yaml")]
    if PATHS in own:
        lines += [f"{PATHS}.{line}" for line in _keys(conf / PATHS / "default.yaml")]
    if every:
        for group, option in chosen.items():
            folder = group.partition("@")[0]
            for path in (root / folder / f"{option}.yaml" for root in (conf, *folders)):
                if path.is_file() and (keys := _keys(path)):
                    lines += ["", f"== {group}={option} ==", *keys]
                    break
        with open_dict(config):
            del config["hydra"]
        lines += ["", "== Config (override anything: key.subkey=value) ==", OmegaConf.to_yaml(config).rstrip()]
    return "\n".join((*lines, "", footer.rstrip()))


def _options(group: str, folders: Sequence[Path]) -> list[str]:
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def _keys(path: Path) -> list[str]:
    """The lines of a config below its defaults, comments included."""
    if not path.is_file():  # of a config that a plugin or a folder of the user's brings
        return []
    lines, among_defaults, kept = path.read_text().splitlines(), False, []
    for line in lines:
        if line.startswith("defaults:"):
            among_defaults = True
        elif among_defaults and (not line.strip() or line.startswith((" ", "-", "#"))):
            continue
        else:
            among_defaults = False
            kept.append(line)
    first = next((number for number, line in enumerate(kept) if line.strip() and not line.startswith("#")), len(kept))
    kept = kept[first:]
    while kept and not kept[-1].strip():
        kept.pop()
    return kept
