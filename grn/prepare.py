"""python -m grn.prepare data=digits: writes a source's webdataset shards into `data.root` (conf/prepare.yaml)."""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from grn.cli import entry_point


@entry_point("prepare")
def main(config: DictConfig) -> None:
    instantiate(config.source).write(Path(config.data.root), overwrite=config.overwrite)


if __name__ == "__main__":
    main()
