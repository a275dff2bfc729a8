"""Webdataset shards from a source of images or clips: what `python -m grn.prepare` does."""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from grn.runtime.errors import UserError
from grn.runtime.ranks import place


def prepare(config: DictConfig) -> None:
    """Writes the shards of `source` into `data.root`."""
    if config.data.root is None:
        raise UserError("data.root must be given: data.root=/folder/for/the/shards")
    rank, _, world_size = place()
    source = instantiate(config.source)
    source.write(Path(config.data.root).expanduser(), overwrite=config.overwrite, rank=rank, world_size=world_size)
