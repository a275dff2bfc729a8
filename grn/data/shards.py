"""Writing data sets as webdataset shards with a manifest, whole or not at all; and reading the manifest back."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import webdataset as wds
from rich.progress import track

from grn.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"


def write_shards(
    root: str | os.PathLike,
    *,
    name: str,
    parameters: Mapping[str, object],
    splits: Mapping[str, Sequence[Mapping[str, object]]],
    num_shards: Mapping[str, int],
    image_size: int,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> bool:
    """Writes `<root>/<split>-000000.tar` ... and `<root>/manifest.json`.

    Everything is written beside `root` and moved there at once, so `root` is never half written. The bytes depend on
    the arguments alone. Sample i of a split goes to shard i mod its number of shards.

    Args:
        root: folder to write; may be missing or empty, or hold what an earlier call wrote.
        name: of the data set.
        parameters: what the samples were made from (JSON values); tells whether `root` is up to date.
        splits: name -> samples, {"__key__": str, suffix: bytes or str, ...}.
        num_shards: name of a split -> its number of shards.
        image_size: height and width, in pixels.
        num_labels: labels lie in [0, num_labels).
        label_names: one for each label.
        overwrite: replace a data set in `root` that was made with other parameters, or is damaged.

    Returns:
        Whether anything was written; False where `root` is up to date already.

    Raises:
        UserError: `root` holds something else.
    """
    root = Path(root).absolute()
    parameters = json.loads(json.dumps(dict(parameters)))
    if root.exists() and not overwrite and _is_up_to_date(root, name, parameters):
        log.info("%s is up to date: nothing to do", root)
        return False
    _check_replaceable(root)

    root.parent.mkdir(parents=True, exist_ok=True)
    # Within a folder of its own, so that the data set itself gets the usual permissions and not those of mkdtemp.
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as scratch:
        fresh, old = Path(scratch, "fresh"), Path(scratch, "old")
        fresh.mkdir()
        manifest = {
            "format": FORMAT,
            "name": name,
            "parameters": parameters,
            "image_size": image_size,
            "num_labels": num_labels,
            "label_names": None if label_names is None else list(label_names),
            "splits": {
                split: {"samples": len(samples), "shards": _write_split(fresh, split, samples, num_shards[split])}
                for split, samples in splits.items()
            },
        }
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if root.exists() and any(root.iterdir()):
            os.replace(root, old)
        try:
            os.replace(fresh, root)
        except OSError:
            if old.exists():
                os.replace(old, root)
            raise
    log.info("wrote %s to %s", ", ".join(f"{len(samples)} {split}" for split, samples in splits.items()), root)
    return True


def read_manifest(root: str | os.PathLike) -> dict | None:
    """The manifest of `root`; None where there is none.

    Raises:
        UserError: it is not one that `write_shards` wrote.
    """
    path = Path(root, MANIFEST)
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} has format {manifest['format']!r}, this version reads {FORMAT}: make it anew")
        for split in manifest["splits"].values():
            int(split["samples"])
            for shard in split["shards"]:
                if Path(shard["name"]).name != shard["name"] or type(shard["bytes"]) is not int:
                    raise ValueError(shard["name"])
        if not manifest.keys() >= {"name", "parameters", "num_labels", "label_names"}:
            raise ValueError("a key is missing")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no manifest of shards ({type(error).__name__}): make the data anew") from None
    return manifest


def shard_paths(root: str | os.PathLike, manifest: Mapping[str, dict], split: str) -> list[str]:
    """The shards of a split in order, present and as large as the manifest says.

    Raises:
        UserError: no such split, a shard is missing or has another size.
    """
    if split not in manifest["splits"]:
        raise UserError(f"data.root={root} has no split {split!r}, only {', '.join(manifest['splits'])}")
    paths = []
    for shard in manifest["splits"][split]["shards"]:
        path = Path(root, shard["name"])
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
            raise UserError(
                f"data.root is damaged: {path} {found}; make it anew: "
                f"python -m grn.prepare data={manifest['name']} overwrite=true"
            )
        paths.append(str(path))
    return paths


def _write_split(folder: Path, split: str, samples: Sequence[Mapping[str, object]], num_shards: int) -> list[dict]:
    if not 1 <= num_shards <= len(samples):
        raise UserError(f"source: {len(samples)} {split} samples cannot fill {num_shards} shards")
    shards = []
    for number in track(range(num_shards), description=f"writing {split}"):
        path = folder / f"{split}-{number:06d}.tar"
        own = samples[number::num_shards]
        with (
            open(path, "wb") as file,
            wds.TarWriter(file, user="grn", group="grn", mode=0o644, mtime=0, encoder=False) as tar,
        ):
            for sample in own:
                tar.write(
                    {suffix: data.encode() if isinstance(data, str) else data for suffix, data in sample.items()}
                    | {"__key__": sample["__key__"]}
                )
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        shards.append({"name": path.name, "samples": len(own), "bytes": len(data), "sha256": digest})
    return shards


def _is_up_to_date(root: Path, name: str, parameters: dict) -> bool:
    """Raises a UserError where `root` holds another data set, or a damaged one."""
    manifest = read_manifest(root)
    if manifest is None:
        return False
    if (manifest["name"], manifest["parameters"]) != (name, parameters):
        own = {"name": name} | parameters
        other = {"name": manifest["name"]} | manifest["parameters"]
        key = next(key for key in [*own, *other] if own.get(key) != other.get(key))
        raise UserError(
            f"data.root={root} holds data made with {key}={other.get(key)}, not {own.get(key)}: "
            "give another data.root, or overwrite=true to replace it"
        )
    for split in manifest["splits"]:
        shard_paths(root, manifest, split)
    return True


def _check_replaceable(root: Path) -> None:
    """Only what `write_shards` wrote is ever replaced, whatever `overwrite` says."""
    if root.exists() and not root.is_dir():
        raise UserError(f"data.root={root} is not a folder")
    if root.is_symlink():
        raise UserError(f"data.root={root} is a link: give the folder it points to")
    if root.exists() and any(root.iterdir()) and not (root / MANIFEST).is_file():
        raise UserError(f"data.root={root} holds files that grn.prepare did not write: give another data.root")
