"""python -m grn.compare runs/a runs/b: what differs between evaluations, with their samples (conf/compare.yaml)."""

import sys

from omegaconf import DictConfig

from grn.cli.entry import entry_point
from grn.cli.words import as_overrides


@entry_point("compare", light=True)
def command(config: DictConfig) -> None:
    from grn.evaluation.compare import compare

    compare(config)


def main() -> None:
    """The command."""
    sys.argv[1:] = as_overrides(sys.argv[1:], "results", several=True)
    command()


if __name__ == "__main__":
    main()
