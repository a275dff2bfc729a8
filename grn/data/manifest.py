"""The manifest of a data set in shards, which `grn.data.prepare.shards` writes: read and checked, without torch."""

import json
import os
from pathlib import Path

from grn.runtime.errors import UserError
from grn.runtime.files import read_bounded

FORMAT = 1
MANIFEST = "manifest.json"
MAX_BYTES = 2**28  # of a manifest: a million shards


def read_manifest(root: str | os.PathLike) -> dict | None:
    """The manifest of `root`; None where there is none.

    Raises:
        UserError: it is not one that `grn.data.prepare.shards.write_shards` wrote.
    """
    path = Path(root, MANIFEST)
    if not path.is_file():
        return None
    try:
        manifest = json.loads(read_bounded(path, MAX_BYTES))
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} has format {manifest['format']!r}, this version reads {FORMAT}: recreate it")
        for split in manifest["splits"].values():
            int(split["samples"])
            for shard in split["shards"]:
                if Path(shard["name"]).name != shard["name"] or type(shard["bytes"]) is not int:
                    raise ValueError(shard["name"])
        if not manifest.keys() >= {"name", "parameters", "num_labels", "label_names"}:
            raise ValueError("a key is missing")
        if not isinstance(manifest["parameters"], dict):
            raise TypeError("parameters")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a manifest of shards ({type(error).__name__}): prepare it again") from None
    return manifest


def token_manifest(root: str | os.PathLike | None, *, key: str) -> dict:
    """The manifest of token shards in `root`; `key` is the part of the config that names it, e.g. data.

    Raises:
        UserError: there is none, or it is of pixels.
    """
    manifest = None if root is None else read_manifest(root)
    if not (manifest and "tokenizer" in manifest):
        raise UserError(
            f"{key}.root={root} holds no token shards with their manifest; write them with "
            f"`python -m grn.encode ckpt=TOKENIZER data=...`, and give that folder as {key}.root"
        )
    return manifest


def how_to_make(name: str, key: str) -> str:
    """What to do about shards of the data set `name` that are not there; `key` would say where else they are."""
    return f"make them with `python -m grn.prepare data={name}`, or say where they are by {key}"
