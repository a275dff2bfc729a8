"""Where the configuration lies."""

from pathlib import Path

from omegaconf import OmegaConf

_PACKAGE = Path(__file__).resolve().parents[1]
# A checkout keeps conf/ at its top; an installed wheel carries it inside the package (pyproject.toml).
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())


def own_groups(path: Path) -> set[str]:
    """The groups that a command's config names itself."""
    defaults = OmegaConf.select(OmegaConf.load(path), "defaults", default=[]) if path.is_file() else []
    names = (str(next(iter(entry))) for entry in defaults if OmegaConf.is_dict(entry))
    return {name.removeprefix("override ").removeprefix("optional ").strip("/") for name in names}


def top_level_keys(config_name: str) -> set[str]:
    """What stands at the top of a command's config."""
    path = CONF / f"{config_name}.yaml"
    return (own_groups(path) | {str(key) for key in OmegaConf.load(path)}) - {"defaults", "cli"}
