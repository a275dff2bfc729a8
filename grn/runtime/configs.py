"""What OmegaConf makes of mappings, which its own types leave open."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf


def plain(config: Mapping[Any, Any], *, resolve: bool = False) -> dict[str, Any]:
    """`OmegaConf.to_container` of a mapping."""
    container: Any = OmegaConf.to_container(config, resolve=resolve)
    return container


def merged(first: Mapping[Any, Any], *others: Mapping[Any, Any]) -> DictConfig:
    """`OmegaConf.merge` of mappings; later ones win."""
    config: Any = OmegaConf.merge(first, *others)
    return config
