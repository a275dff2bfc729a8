"""samples.npz: every sample of an evaluation, in the form that ADM's evaluator and most others read."""

import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from grn.runtime.errors import UserError
from grn.runtime.files import write_atomically
from grn.runtime.ranks import together


def remove_parts(path: Path) -> None:
    """Removes the files of ranks that were killed before the archive `path` was made of them."""
    for part in path.parent.glob(f".{path.name}.*"):
        if part.is_file():
            part.unlink(missing_ok=True)


class SampleArchive:
    """Keeps images of all ranks: `arr_0` uint8 [N, H, W, 3] and `arr_1`, their labels, int64 [N], uncompressed.

    Each rank adds its images, i mod ranks, to a file of its own beside `path`, out of which the first rank makes the
    archive; no more than a batch is held in memory. A context, which removes those files.

    Args:
        path: of the npz, in a folder that all ranks share.
        rank, world_size: whose images this process adds, of how many.

    Raises:
        UserError: the folder cannot be written to, or is not shared; from the methods.
    """

    def __init__(self, path: Path, *, rank: int = 0, world_size: int = 1):
        self.path, self.rank = path, rank
        self.parts = [path.with_name(f".{path.name}.{number}") for number in range(world_size)]
        self.shape: tuple[int, ...] = ()  # (H, W, 3)
        self._part: BinaryIO | None = None

    def __enter__(self) -> "SampleArchive":
        return self

    def __exit__(self, *error: object) -> None:
        if self._part is not None:
            self._part.close()
            self.parts[self.rank].unlink(missing_ok=True)

    def add(self, images: Tensor, ids: Tensor) -> None:
        """Adds some of this rank's images, uint8 [B, 3, H, W], numbers `ids` int64 [B] of all, in any order."""
        pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self.shape = pixels.shape[1:]
        try:
            if self._part is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._part = self.parts[self.rank].open("wb")
            for place, image in zip((ids // len(self.parts)).tolist(), pixels):
                self._part.seek(place * image.nbytes)
                self._part.write(image.tobytes())
        except OSError as error:
            raise UserError(f"images=true: {self.parts[self.rank]} cannot be written: {error.strerror}") from error

    def save(self, labels: Tensor) -> None:
        """Writes the archive of all ranks' images, atomically; every rank must call it.

        Args:
            labels: int64 [N], of the images of all ranks.
        """
        with together():
            if self._part is not None:
                self._part.close()
        with together():
            if self.rank == 0:
                write_atomically(self.path, lambda temporary: self._write(temporary, labels))

    def _write(self, temporary: Path, labels: Tensor) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *self.shape)}
        image_bytes = int(np.prod(self.shape))
        with ExitStack() as stack:
            try:
                parts = [stack.enter_context(part.open("rb")) for part in self.parts[: len(labels)]]
            except FileNotFoundError as error:
                raise UserError(
                    f"images=true: all ranks must share the folder `out`, {error.filename} is not there"
                ) from error
            archive = stack.enter_context(zipfile.ZipFile(temporary, "w"))
            with archive.open("arr_0.npy", "w", force_zip64=True) as images:
                np.lib.format.write_array_header_1_0(images, header)
                for i in range(len(labels)):
                    images.write(parts[i % len(parts)].read(image_bytes))
            with archive.open("arr_1.npy", "w") as array:
                np.lib.format.write_array(array, labels.cpu().numpy(), allow_pickle=False)
