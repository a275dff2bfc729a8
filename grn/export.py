"""python -m grn.export ckpt=runs/digits_c2i: a trained refiner or tokenizer as a folder to share (conf/export.yaml)."""

from omegaconf import DictConfig

from grn.cli.entry import entry_point


@entry_point("export", writes="out")
def main(config: DictConfig) -> None:
    from grn.training.export import export

    export(config)


if __name__ == "__main__":
    main()
