"""python -m grn.info runs/digits_c2i: what a checkpoint, an export or one of the authors' files is (conf/info.yaml)."""

import sys

from omegaconf import DictConfig

from grn.cli.entry import entry_point
from grn.cli.words import as_overrides


@entry_point("info", reads=True, light=True)
def command(config: DictConfig) -> None:
    from grn.checkpoints.summary import show

    show(config.ckpt, as_json=config.json)


def main() -> None:
    """The command."""
    sys.argv[1:] = as_overrides(sys.argv[1:], "ckpt")
    command()


if __name__ == "__main__":
    main()
