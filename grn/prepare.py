"""python -m grn.prepare data=digits: writes a source's webdataset shards into `data.root` (conf/prepare.yaml)."""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from grn.cli import entry_point
from grn.errors import UserError
from grn.launch import place


@entry_point("prepare")
def main(config: DictConfig) -> None:
    if config.data.root is None:
        raise UserError("data.root must be given: data.root=/folder/for/the/shards")
    rank, _, world_size = place()
    source = instantiate(config.source)
    source.write(Path(config.data.root).expanduser(), overwrite=config.overwrite, rank=rank, world_size=world_size)


if __name__ == "__main__":
    main()
