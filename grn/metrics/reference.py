"""Real images that are given as a path: a folder of them, or `arr_0` of an npz, as ADM's reference batches have it.

ADM's reference batches: github.com/openai/guided-diffusion/tree/main/evaluations.
"""

import zipfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grn.media.images import IMAGE_SUFFIXES, decode_image, to_tensor
from grn.media.skips import Skip
from grn.metrics.splits import Split
from grn.runtime.errors import UserError
from grn.runtime.files import Unreadable, read_bounded

ARRAY = "arr_0.npy"
BATCH = 64
MAX_FILE_BYTES = 256 * 2**20
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


def is_folder(reference: str | Path | None) -> bool:
    return bool(reference) and Path(reference).expanduser().is_dir()


def holds_images(path: str | Path | None) -> bool:
    """Whether an npz has `arr_0`; False of what is no npz."""
    if not path:
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return ARRAY in archive.namelist()
    except UNREADABLE:
        return False


def images_at(path: str | Path, *, key: str) -> Split:
    """A split (`grn.metrics.splits`) of the images at a path, in their order, of a folder by their names.

    Args:
        path: a folder, images of any of our formats at any depth; or an npz with `arr_0` uint8 [N, H, W, 3].
        key: for messages.

    Raises:
        UserError: a folder without images; and while they are read, a file that is damaged or of another kind.
    """
    if not is_folder(path):
        return lambda: ({"pixels": batch} for batch in _of_array(Path(path), key))
    folder = Path(path).expanduser()
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"{key}: no images in {folder}")
    return lambda: ({"pixels": batch} for batch in _of_files(files, key))


def _of_files(files: list[Path], key: str) -> Iterator[Tensor]:
    def decoded() -> Iterator[Tensor]:
        for file in files:
            try:
                yield to_tensor(decode_image(read_bounded(file, MAX_FILE_BYTES)))
            except (Skip, Unreadable, FileNotFoundError) as error:
                raise UserError(f"{key}: {file} cannot be read ({error}): leave it out of the folder") from error

    for _, same in groupby(decoded(), key=lambda image: image.shape):
        yield from _in_batches(same)


def _of_array(path: Path, key: str) -> Iterator[Tensor]:
    """Read from the archive block by block: 10 000 images of 256x256 are 2 GB."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(ARRAY) as member:
            version = np.lib.format.read_magic(member)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, is_fortran, dtype = read(member)
            if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or is_fortran or not all(shape):
                raise UserError(f"{key}: arr_0 of {path} is {dtype} {list(shape)}, not uint8 [N, H, W, 3]")
            image = int(np.prod(shape[1:]))
            if image > MAX_FILE_BYTES:
                raise UserError(f"{key}: arr_0 of {path} has images of {shape[1]}x{shape[2]}, which are too large")
            for begin in range(0, shape[0], BATCH):
                count = min(BATCH, shape[0] - begin)
                block = member.read(count * image)
                if len(block) < count * image:
                    raise EOFError
                yield torch.frombuffer(bytearray(block), dtype=torch.uint8).view(count, *shape[1:]).permute(0, 3, 1, 2)
    except (*UNREADABLE, KeyError) as error:
        raise UserError(
            f"{key}: arr_0 of {path} cannot be read ({type(error).__name__}): write the file again"
        ) from error


def _in_batches(images: Iterator[Tensor]) -> Iterator[Tensor]:
    held: list[Tensor] = []
    for image in images:
        held.append(image)
        if len(held) == BATCH:
            yield torch.stack(held)
            held = []
    if held:
        yield torch.stack(held)
