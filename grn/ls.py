"""python -m grn.ls: the runs of a folder, with their steps and scores (conf/ls.yaml)."""

import sys

from omegaconf import DictConfig

from grn.cli.entry import entry_point
from grn.cli.words import as_overrides


@entry_point("ls", reads=True, light=True)
def command(config: DictConfig) -> None:
    from grn.runs.table import show_runs

    show_runs(config.folder, as_json=config.json)


def main() -> None:
    """The command."""
    sys.argv[1:] = as_overrides(sys.argv[1:], "folder")
    command()


if __name__ == "__main__":
    main()
