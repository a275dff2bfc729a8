"""What training asks of a LightningDataModule: any whose loaders give these batches will do.

Batches are dictionaries:

    pixels   uint8 [B, 3, T, H, W], RGB; images have T = 1
    label    int64 [B] in [0, classes), for class refiners
    key      B texts, optional: names of the samples. Validation corrupts a sample by its name, so that the loss is
             the same on any number of ranks; without, by its place

Text refiners train on packs, which `grn.data` makes alone (`grn.data.stream.packing`).

Optional, as methods or attributes of the data module:

    name                      for messages
    split_dataloader(split)   batches of the whole split `train` or `val`, for scores against real data
    skipped(), noted()        reason -> samples that could not be used, or could all the same
    stop_loading()            called when the run is asked to stop
    state_dict(), load_state_dict()   Lightning's own, to resume in the middle of an epoch
"""

from typing import Any

import torch
from torch import Tensor

from grn.runtime.errors import UserError


def check_batch(batch: Any, *, num_labels: int | None) -> None:
    """Args:
        num_labels: of a class refiner; None: labels are not read.

    Raises:
        UserError: a batch of another kind than above.
    """
    wanted = "data: batches must be dictionaries of pixels (uint8 [B, 3, T, H, W]; images have T = 1)"
    wanted += " and label (int64 [B])" if num_labels is not None else ""
    if not isinstance(batch, dict):
        raise UserError(f"{wanted}; these are of type {type(batch).__name__}")
    if "bits" not in batch:
        pixels = batch.get("pixels")
        if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8 or pixels.ndim != 5 or pixels.shape[1] != 3:
            raise UserError(f"{wanted}; pixels is {_kind(pixels)}")
    if num_labels is not None:
        label = batch.get("label")
        if not isinstance(label, Tensor) or label.dtype != torch.int64 or label.ndim != 1:
            raise UserError(f"{wanted}; label is {_kind(label)}")
        if len(label) and not 0 <= int(label.min()) <= int(label.max()) < num_labels:
            raise UserError(
                f"data: labels are {int(label.min())} to {int(label.max())}, and model.num_labels={num_labels}"
            )


def count_samples(batch: dict[str, Any]) -> int:
    """How many samples are in a batch."""
    return len(batch["key"] if "key" in batch else batch["pixels"])


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "not there" if value is None else f"of type {type(value).__name__}"
