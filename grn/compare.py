"""python -m grn.compare runs/a runs/b: what differs between evaluations, with their samples (conf/compare.yaml)."""

import sys

from omegaconf import DictConfig

from grn.cli.entry import entry_point
from grn.runtime.overrides import quote

TAKES_VALUE = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-name", "-cn", "--config-path", "-cp")
TAKES_VALUE += ("--config-dir", "-cd", "--experimental-rerun")


@entry_point("compare")
def command(config: DictConfig) -> None:
    from grn.evaluation.compare import compare

    compare(config)


def as_overrides(words: list[str]) -> list[str]:
    """Folders may stand alone: `A B` is results=[A,B]."""
    places = [i for i, word in enumerate(words) if "=" not in word and word[:1] not in "-+~"]
    places = [i for i in places if i == 0 or words[i - 1] not in TAKES_VALUE]
    if not places:
        return words
    results = ",".join(quote(words[i], "path") for i in places)
    return [*(word for i, word in enumerate(words) if i not in places), f"results=[{results}]"]


def main() -> None:
    """The command."""
    sys.argv[1:] = as_overrides(sys.argv[1:])
    command()


if __name__ == "__main__":
    main()
