"""python -m grn.studio ckpt=runs/digits_c2i: a page to watch samples being refined (conf/studio.yaml)."""

from omegaconf import DictConfig

from grn.cli.entry import entry_point


@entry_point("studio", writes="out")
def main(config: DictConfig) -> None:
    from grn.web.server import serve

    serve(config)


if __name__ == "__main__":
    main()
