"""python -m grn.consolidate ckpt=runs/c2i_ind_G: a sharded checkpoint as a single file (conf/consolidate.yaml)."""

from omegaconf import DictConfig

from grn.cli.entry import entry_point


@entry_point("consolidate", writes="out")
def main(config: DictConfig) -> None:
    from grn.checkpoints.consolidate import consolidate

    consolidate(config)


if __name__ == "__main__":
    main()
