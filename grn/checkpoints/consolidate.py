"""A sharded checkpoint as a single file: what `python -m grn.consolidate` does."""

import logging
from pathlib import Path

import torch
from omegaconf import DictConfig

from grn.checkpoints.native import find_checkpoint
from grn.checkpoints.sharded import read_sharded, verify
from grn.runtime.errors import UserError
from grn.runtime.files import write_atomically
from grn.weights.kinds import is_sharded_checkpoint

log = logging.getLogger(__name__)


def consolidate(config: DictConfig) -> Path:
    """Writes `out`, from which training goes on, too, as from the folder; returns its path.

    It takes as much memory as the file is large: weights, averages and optimizer state in float32.
    """
    path = find_checkpoint(config.ckpt)
    if not is_sharded_checkpoint(path):
        raise UserError(f"ckpt: {path} is a single file already")
    out = Path(config.out or path.with_name(f"{path.stem}_whole.ckpt")).expanduser()
    if out.is_dir():
        raise UserError(f"out={out} is a folder: name a file")
    verify(path, key="ckpt")  # the file gets checksums of its own, whatever is in it
    checkpoint = read_sharded(path, f"ckpt: {path} cannot be read as a checkpoint")
    write_atomically(out, lambda temporary: torch.save(checkpoint, temporary))
    log.info("consolidated: %s (step %s, %.2f GB)", out, checkpoint.get("global_step"), out.stat().st_size / 1e9)
    return out
