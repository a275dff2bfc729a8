"""Checkpoints of which every rank writes and reads its own shards, by `torch.distributed.checkpoint`.

A checkpoint is the dict that Lightning makes, as in a single file, but some of its tensors are DTensors. The folder has

- `rest.pt`: the dict, with `{SHARDED: [name, shape, dtype]}` in the place of each DTensor, and the name of
- a subfolder with the shards. A new one is filled beside it, and `rest.pt` is renamed last: it is whole or not there.
"""

import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from grn.runtime.errors import UserError
from grn.runtime.files import temporary_prefix, write_atomically
from grn.weights.integrity import Damaged, check_archive, check_slices, digest, keep_previous, others_beside
from grn.weights.kinds import REST, is_sharded_checkpoint
from grn.weights.reading import read_untrusted

SHARDED = "__sharded__"
INDEX = ".metadata"  # torch's name


def write_sharded(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint with DTensors; every rank must call it. What was at `path` is replaced."""
    shards: dict[str, DTensor] = {}
    rest = _take_out(checkpoint, (), shards)
    first = dist.get_rank() == 0
    places: list[Any] = [_places(Path(path)) if first else None]
    dist.broadcast_object_list(places)
    folder, subfolder = places[0]
    try:
        dcp.save(shards, checkpoint_id=folder / subfolder)
    except CheckpointException as error:  # on every rank; a full disk, for one
        raise UserError(f"the checkpoint {path} cannot be written ({_reason(error)})") from None
    if first:
        content = {"shards": subfolder, "index": digest(folder / subfolder / INDEX), "checkpoint": rest}
        keep_previous(Path(path), without=subfolder)
        write_atomically(folder / REST, lambda temporary: torch.save(content, temporary))
        if folder != path:
            path.unlink()  # a checkpoint in a single file, from before the run was sharded
            os.replace(folder, path)
        for other in Path(path).iterdir():
            if other.is_dir() and other.name != subfolder:
                shutil.rmtree(other)
    dist.barrier()


def read_either(path: Path, complaint: str, *, mmap: bool = False, **sharded: Any) -> Any:
    """The contents of a checkpoint in a single file, or in a folder of shards.

    Args:
        complaint, mmap: as `read_untrusted` has them; a folder is never mapped.
        sharded: as `read_sharded` has them; without effect on a single file.
    """
    if is_sharded_checkpoint(path):
        return read_sharded(path, complaint, **sharded)
    return read_untrusted(path, complaint, mmap=mmap)


def verify(path: Path, *, key: str, share: tuple[int, int] = (0, 1)) -> None:
    """Reads a checkpoint, a file or a folder of shards, and compares its checksums.

    Args:
        key: the config key that errors name.
        share: (number of this process, number of processes) that share the work on the shards.

    Raises:
        UserError: it is damaged; the line names others beside it.
    """
    try:
        if is_sharded_checkpoint(path):
            _verify_sharded(path, *share)
        else:
            check_archive(path, whole=True)
    except Damaged as damage:
        raise UserError(f"{key}: {path} is damaged ({damage}); {others_beside(path, key=key)}") from None


def _verify_sharded(path: Path, number: int, processes: int) -> None:
    check_archive(path / REST, whole=True)
    slices: dict[str, list[tuple[int, int]]] = {}
    try:
        content = read_untrusted(path / REST, "it")
        folder = path / Path(content["shards"]).name
        if content.get("index") not in (None, digest(folder / INDEX)):  # None before it was recorded
            raise Damaged("the index of its shards has another checksum")
        for info in _Reader(folder).index.storage_data.values():
            slices.setdefault(info.relative_path, []).append((int(info.offset), int(info.length)))
    except Damaged:
        raise
    except Exception as error:  # what a damaged or hostile folder can raise has no end
        raise Damaged(_reason(error)) from None
    for file in sorted(slices)[number::processes]:
        check_slices(folder / file, slices[file])


def read_sharded(
    path: Path,
    complaint: str,
    *,
    empty: Callable[[torch.Size, torch.dtype], Tensor] = lambda shape, dtype: torch.empty(shape, dtype=dtype),
    skip: Collection[str] = (),
) -> dict[str, Any]:
    """The checkpoint in a folder, as of a single file: nothing in it is executed. Each process reads for itself.

    Args:
        complaint: the error's words before the reason, e.g. "ckpt: runs/x/last.ckpt cannot be read as a checkpoint".
        empty: (shape, dtype) of a whole tensor -> what is filled: a tensor, or a DTensor of which only the shards of
            this rank are read.
        skip: keys of the checkpoint that are left out.

    Raises:
        UserError: damaged, foreign or hostile.
    """
    content = read_untrusted(path / REST, complaint)
    try:
        rest, subfolder = content["checkpoint"], path / Path(content["shards"]).name
        tensors: dict[str, Tensor] = {}
        reader, seen = _Reader(subfolder), {}
        checkpoint = {
            key: _put_back(value, reader.index, tensors, empty, seen) for key, value in rest.items() if key not in skip
        }
        if tensors:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # what a damaged or hostile folder can raise has no end
        raise UserError(f"{complaint} ({_reason(error)})") from None
    return checkpoint


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, on the first rank where it did."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _places(path: Path) -> tuple[Path, str]:
    """(The folder to write into, the name of its new subfolder)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=temporary_prefix(path)))
        folder.chmod(path.parent.stat().st_mode)  # mkdtemp's is private to its owner
    else:
        folder = path
        folder.mkdir(exist_ok=True)
    number = max((int(other.name) for other in folder.iterdir() if other.name.isdecimal()), default=0) + 1
    return folder, f"{number:06d}"


def _take_out(node: Any, keys: tuple[str, ...], shards: dict[str, DTensor]) -> Any:
    """`node` with its DTensors moved into `shards`."""
    if isinstance(node, DTensor):
        name = "/".join(keys)
        shards[name] = node
        return {SHARDED: [name, list(node.shape), node.dtype]}
    if isinstance(node, dict):
        return {key: _take_out(value, (*keys, str(key)), shards) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_take_out(value, (*keys, str(i)), shards) for i, value in enumerate(node))
    return node


def _put_back(node: Any, index: Metadata, tensors: dict[str, Tensor], empty: Callable, seen: dict[int, Any]) -> Any:
    """`node` with an empty tensor in each place that a DTensor was taken out of; `tensors` gets them all.

    Args:
        seen: what was made of each container so far, by its id: a hostile file shares them, many levels deep.
    """
    if not isinstance(node, (dict, list, tuple)):
        return node
    if id(node) not in seen:
        seen[id(node)] = _put_back_once(node, index, tensors, empty, seen)
    return seen[id(node)]


def _put_back_once(
    node: Any, index: Metadata, tensors: dict[str, Tensor], empty: Callable, seen: dict[int, Any]
) -> Any:
    if isinstance(node, dict) and SHARDED in node:
        name, shape, dtype = node[SHARDED]
        stored = index.state_dict_metadata.get(name)
        # Anything else would be unpickled.
        if not isinstance(stored, TensorStorageMetadata) or (stored.size, stored.properties.dtype) != (
            torch.Size(shape),
            dtype,
        ):
            raise ValueError(f"the shards have no {name} of shape {list(shape)} and {dtype}")
        tensors[name] = empty(torch.Size(shape), dtype)
        return tensors[name]
    if isinstance(node, dict):
        return {key: _put_back(value, index, tensors, empty, seen) for key, value in node.items()}
    return type(node)(_put_back(value, index, tensors, empty, seen) for value in node)


class _Reader(dcp.FileSystemReader):
    """Reads the index, which is a pickle, without executing anything; the shards themselves are read so by torch."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        with (folder / INDEX).open("rb") as file:
            self.index = _IndexUnpickler(file).load()
        if not isinstance(self.index, Metadata):
            raise pickle.UnpicklingError("the index of the shards is something else")
        if any(Path(info.relative_path).name != info.relative_path for info in self.index.storage_data.values()):
            raise pickle.UnpicklingError("the index of the shards points out of its folder")
        stored = [t for t in self.index.state_dict_metadata.values() if isinstance(t, TensorStorageMetadata)]
        if sum(t.size.numel() * t.properties.dtype.itemsize for t in stored) > _size(folder):
            raise pickle.UnpicklingError("the shards hold less than their index says")

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        self.index.storage_meta = StorageMeta(load_id=self.load_id)
        return self.index


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


class _IndexUnpickler(pickle.Unpickler):
    CLASSES = {
        "torch.distributed.checkpoint.metadata": {
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"},
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in self.CLASSES.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index of the shards wants to call {module}.{name}")
