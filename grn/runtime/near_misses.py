"""Suggestions for config keys that do not exist, from the whole tree of keys, and for other names."""

import difflib
from collections.abc import Iterable, Iterator

from omegaconf import DictConfig

# What others call it, and what we do.
ALIASES = {
    "bs": ("batch_size",),
    "cfg": ("guidance",),
    "cfg_scale": ("guidance",),
    "checkpoint": ("ckpt", "ckpt_path"),
    "classes": ("labels", "num_labels"),
    "ema_decay": ("decays",),
    "epochs": ("max_steps",),
    "gpus": ("devices",),
    "guidance_scale": ("guidance",),
    "iterations": ("max_steps",),
    "lr": ("learning_rate",),
    "max_iters": ("max_steps",),
    "n_samples": ("num",),
    "num_gpus": ("devices",),
    "num_inference_steps": ("steps",),
    "num_samples": ("num",),
    "num_steps": ("steps", "max_steps"),
    "output": ("out",),
    "output_dir": ("out",),
    "prompt": ("prompts",),
    "resume": ("ckpt_path",),
    "steps": ("max_steps",),
    "wd": ("weight_decay",),
    "workers": ("num_workers",),
}
# Where a schedule is the checkpoint's, it has no keys yet.
OF_SCHEDULES = ("steps", "num_steps", "num_inference_steps", "min_steps", "max_steps")
LIKE = 0.75  # of difflib: dpeth and depth are, num_steps and film_states are not
MOST = 3


def near_misses(key: str, config: DictConfig) -> list[str]:
    """Keys of a config that are like `key`, the likeliest first, at most three.

    Args:
        key: that does not exist, with its dots.
        config: all of it, or the part that `key` is looked for in.
    """
    parent, _, name = key.rpartition(".")
    known = {other: other.rpartition(".")[2] for other in _keys(config)}
    siblings = {leaf: other for other, leaf in known.items() if other.rpartition(".")[0] == parent}
    found = [siblings[leaf] for leaf in near_names(name, siblings)]
    by_depth = sorted(known, key=lambda other: other.count("."))
    for wanted in (name, *ALIASES.get(name, ())):
        found += [other for other in by_depth if known[other] == wanted]
    if not found:
        leaves = near_names(name, set(known.values()))
        found += [other for leaf in leaves for other in by_depth if known[other] == leaf]
    if not found and name in OF_SCHEDULES and "sampler" in config:
        found += ["sampler.schedule.steps, with sampler=linear,"]
    return list(dict.fromkeys(found))[:MOST]


def near_names(name: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that are like one that is not among them, the likeliest first, at most three."""
    return difflib.get_close_matches(name, list(names), n=MOST, cutoff=LIKE)


def _keys(config: DictConfig, above: str = "") -> Iterator[str]:
    """All keys, nodes and leaves, with their dots; Hydra's own left out."""
    for key, value in config.items_ex(resolve=False):
        if not above and key == "hydra":
            continue
        yield f"{above}{key}"
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_interpolation():
            yield from _keys(value, f"{above}{key}.")
