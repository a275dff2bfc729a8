"""python -m grn.prepare data=digits: writes a source's webdataset shards into `data.root` (conf/prepare.yaml)."""

from omegaconf import DictConfig

from grn.cli.entry import entry_point


@entry_point("prepare", writes="data.root", light=True)
def main(config: DictConfig) -> None:
    from grn.data.prepare.prepare import prepare

    prepare(config)


if __name__ == "__main__":
    main()
