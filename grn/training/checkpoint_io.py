"""Checkpoint I/O of unsharded strategies."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from grn.checkpoints.sharded import read_either
from grn.runtime.files import write_atomically
from grn.weights.integrity import keep_previous


def finish() -> None:
    """Waits for all that a GPU was asked for on any stream: averages have one of their own."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class CheckpointIO(TorchCheckpointIO):
    """Single files that are whole or not there (Lightning's pass through $TMPDIR); reads what `FSDP` wrote, too."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        finish()

        def write(temporary: Path) -> None:
            torch.save(checkpoint, temporary)
            keep_previous(Path(path))
            if Path(path).is_dir():  # of a run that was sharded until now
                os.replace(path, temporary.with_name("earlier"))

        write_atomically(Path(path), write)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return read_either(Path(path), f"ckpt_path: {path} cannot be read as a checkpoint")
