"""torch.compile of whole networks, as `cluster.compile` and `compile` ask for it."""

from typing import Any, Literal, get_args

import torch

from grn.networks.captioned_refiner import CaptionedRefiner
from grn.runtime.errors import UserError

# Of a text refiner's block: fixed and free sizes, packs of one block of tokens and of more, with and without gradients,
# texts alone, samples on texts of one length or several came to 13. Beyond the limit, blocks are no longer compiled.
GRAPHS = 64

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
REPLAYING = ("reduce-overhead", "max-autotune")  # those that replay CUDA graphs: on a GPU, one for each size


def check_mode(mode: Any, compiles: Any, *, key: str, trains: bool = False) -> Mode:
    """The value of `<key>_mode`, beside `key`.

    Raises:
        UserError: another one, or one that does not go with the rest.
    """
    if mode not in get_args(Mode):
        raise UserError(f"{key}_mode={mode}: choose among {', '.join(get_args(Mode))}")
    if mode != "default" and not compiles:
        raise UserError(f"{key}_mode={mode} goes with {key}=true alone")
    if trains and mode in REPLAYING:
        # pytorch/pytorch#169545: accumulated gradients, which lie in that memory, came out wrong without an error.
        raise UserError(
            f"{key}_mode={mode} is for grn.evaluate: CUDA graphs would keep gradients where the next step writes over "
            f"them; {key}_mode=max-autotune-no-cudagraphs trains"
        )
    return mode


def compile_network(
    network: Any, device: torch.device, *, key: str, mode: Mode = "default", by_blocks: bool = False
) -> None:
    """Has a network compiled when it is first called, in place: the names in checkpoints stay.

    Args:
        device: what it will run on.
        key: the Hydra key that asks for it.
        mode: of `torch.compile`.
        by_blocks: each of its `blocks` for itself, as a sharded one needs it, which gathers its weights before. So are
            text refiners in any case: outside of the blocks packs differ in more than sizes, and sampling calls
            `predict` and `text_cache`, not the network.

    Raises:
        UserError: a text refiner where its attention goes sample by sample, of which every pack would be compiled anew;
            or with CUDA graphs, of which each length of texts would need its own.
    """
    if isinstance(network, CaptionedRefiner):
        if device.type in ("cpu", "mps"):
            raise UserError(f"{key}=true does not go with a text refiner on {device.type}: leave it out, or take a GPU")
        if mode in REPLAYING:
            raise UserError(
                f"{key}_mode={mode} does not go with a text refiner, whose texts differ in length: "
                f"{key}_mode=max-autotune-no-cudagraphs does"
            )
        by_blocks = True
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for part in network.blocks if by_blocks else [network]:
        part.compile(mode=mode)
