"""torch.compile of whole networks, as `cluster.compile` and `compile` ask for it."""

import torch
from torch import nn

from grn.networks.captioned_refiner import CaptionedRefiner
from grn.runtime.errors import UserError

# Of a text refiner's block: fixed and free sizes, packs of one block of tokens and of more, with and without gradients,
# texts alone, samples on texts of one length or several came to 13. Beyond the limit, blocks are no longer compiled.
GRAPHS = 64


def compile_network(network: nn.Module, device: torch.device, *, key: str, by_blocks: bool = False) -> None:
    """Has a network compiled when it is first called, in place: the names in checkpoints stay.

    Args:
        device: what it will run on.
        key: the Hydra key that asks for it.
        by_blocks: each of its `blocks` for itself, as a sharded one needs it, which gathers its weights before. So are
            text refiners in any case: outside of the blocks packs differ in more than sizes, and sampling calls
            `predict` and `text_cache`, not the network.

    Raises:
        UserError: a text refiner where its attention goes sample by sample, of which every pack would be compiled anew.
    """
    if isinstance(network, CaptionedRefiner):
        if device.type in ("cpu", "mps"):
            raise UserError(f"{key}=true does not go with a text refiner on {device.type}: leave it out, or take a GPU")
        by_blocks = True
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for part in network.blocks if by_blocks else [network]:
        part.compile()
