"""A tiny tokenizer's checkpoint, for tests to put something else into."""

import copy

import torch

from grn.networks.tokenizer import HBQTokenizer

SIZES = {
    "latent_channels": 2,
    "dim": 4,
    "decoder_dim": 4,
    "multipliers": [1, 2],
    "temporal": [False],
    "blocks_per_stage": 1,
}
MODEL = {"_target_": "grn.networks.tokenizer.HBQTokenizer", "weights": None, **SIZES}


def contents():
    torch.manual_seed(0)
    state = HBQTokenizer(**SIZES).state_dict()
    return {
        "state_dict": {f"network.{name}": tensor for name, tensor in state.items()},
        "config": copy.deepcopy({"training": {"_target_": "grn.training.TokenizerModule"}, "model": MODEL}),
        "global_step": 12,
        "ema": {"0.99": {name: tensor + 0.01 for name, tensor in state.items()}},
        "ema_use": "0.99",
    }


def saved(folder, **changes):
    """A run folder whose last.ckpt has these changes; `...` takes a key out."""
    path = folder / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    changed = contents() | changes
    torch.save({key: value for key, value in changed.items() if value is not ...}, path)
    return folder / "run"
