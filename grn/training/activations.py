"""Activation checkpointing: less memory for more computing (Chen et al., arXiv 1604.06174)."""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from grn.runtime.errors import UserError

Mode = Literal["none", "selective", "full"]

_aten = torch.ops.aten
# Where the FLOPs are: their results are kept, and all between them (norms, gates, rotations) is computed again.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,  # seen in a compiled block alone: compiled for itself, it is no operator
}


def checkpoint_activations(network: Any, mode: Mode) -> None:
    """Makes the blocks of a network keep less for the backward pass, from now on; names of parameters stay.

    Args:
        mode: `none`; `selective` keeps the results of matrix products and attention, of flex attention only where the
            block is compiled; `full` keeps each block's input alone, and computes the block twice.

    Raises:
        UserError: another mode, or a network without `blocks`.
    """
    if mode not in get_args(Mode):
        raise UserError(f"cluster.activation_checkpointing must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if mode == "none":
        return
    if not hasattr(network, "blocks"):
        raise UserError(f"cluster.activation_checkpointing={mode} is for refiners: leave it out for a tokenizer")
    contexts = {"context_fn": _selective_contexts} if mode == "selective" else {}
    for block in network.blocks:
        # Nothing in a block draws random numbers, so their state need not be kept.
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **contexts
        )


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operator: Callable, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
