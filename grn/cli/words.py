"""Arguments that stand alone: `grn compare A B` is `grn compare results=[A,B]`."""

from grn.runtime.overrides import quote

TAKES_VALUE = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-name", "-cn", "--config-path", "-cp")
TAKES_VALUE += ("--config-dir", "-cd", "--experimental-rerun")


def as_overrides(words: list[str], key: str, *, several: bool = False) -> list[str]:
    """A command's arguments, with paths that stand alone as overrides of `key`.

    Args:
        several: `key` is a list of them; else each sets it, and Hydra refuses a second.
    """
    places = [i for i, word in enumerate(words) if "=" not in word and word[:1] not in "-+~"]
    places = [i for i in places if i == 0 or words[i - 1] not in TAKES_VALUE]
    if not places:
        return words
    rest = [word for i, word in enumerate(words) if i not in places]
    paths = [quote(words[i], "path") for i in places]
    return [*rest, f"{key}=[{','.join(paths)}]"] if several else [*rest, *(f"{key}={path}" for path in paths)]
