"""Arguments in other forms than Hydra's: `grn compare A B` is `grn compare results=[A,B]`, `--seed=1` is `seed=1`."""

import os
import re

from grn.runtime.overrides import quote

TAKES_VALUE = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-name", "-cn", "--config-path", "-cp")
TAKES_VALUE += ("--config-dir", "-cd", "--experimental-rerun", "--shell-completion")


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


def without_dashes(arguments: list[str]) -> list[str]:
    """A command's arguments, with `--key=value`, as `wandb agent` and many command lines have it, as Hydra has it."""
    keys = [re.match(r"--([\w.@/]+)=", argument) for argument in arguments]
    return [
        argument[2:] if key and f"--{key[1]}" not in TAKES_VALUE else argument for key, argument in zip(keys, arguments)
    ]


def trial_of_a_sweep(overrides: list[str]) -> list[str]:
    """What `wandb agent` leaves to us, as overrides of `grn.train`: each trial has a run folder of its own."""
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    if not sweep or not run or any(re.match(r"\+*(name|paths\.run)=", override) for override in overrides):
        return []
    return [f"name=sweeps/{sweep}/{run}"]
