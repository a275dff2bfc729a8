"""From a config out of a file to a network with the file's weights: one way in, for checkpoints and for exports."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from grn.runtime.errors import UserError
from grn.weights.mapping import RIGHT_SIZES, check_state, load_strict

MAX_TABLES = 2**30  # bytes of what a network computes when it is made: rotary tables, positions

Network = TypeVar("Network", bound=nn.Module)


def build_with_weights(
    make: Callable[[], Network],
    state: Mapping[str, Tensor],
    *,
    source: str,
    described: str,
    remedy: str = RIGHT_SIZES,
) -> Network:
    """A network that holds the tensors of `state` themselves; no size that its config claims is allocated, or looped
    over, before it is found in the weights.

    Args:
        make: makes the network, on whatever device is the default.
        state: its weights, of strided floats.
        source, remedy: as `grn.weights.mapping.check_state` has them.
        described: the error's words where no network can be made, e.g. "x.ckpt describes no network".

    Raises:
        UserError: what is described is no network, or the weights are not its own, not finite, or not all there.
    """
    _check_stored(state, source)
    network = _on_meta(make, len(state), described)
    if any(buffer.is_meta for buffer in network.buffers()):
        check_state(network, state, source=source, remedy=remedy)
        if (tables := sum(buffer.numel() * buffer.itemsize for buffer in network.buffers())) > MAX_TABLES:
            raise UserError(f"{described} (its tables would take {tables / 2**30:.0f} GiB)")
        with _parameters_on_meta(), torch.random.fork_rng(devices=[]):
            network = make()
    load_strict(network, state, source=source, remedy=remedy)
    return network


def _on_meta(make: Callable[[], Network], tensors: int, described: str) -> Network:
    with _watched(limit=2 * tensors + 100), torch.device("meta"):
        try:
            return make()
        except Exception as error:  # whatever a constructor makes of values of any kind
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{described} ({reason[:200]})") from None


def _check_stored(state: Mapping[str, Tensor], source: str) -> None:
    """Views of a few numbers can look like weights of any size."""
    claimed = sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    storages = [tensor.untyped_storage() for tensor in state.values() if not tensor.is_meta]
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if claimed > 2 * stored + 2**20:  # twice: weights may be tied
        raise UserError(f"{source} claims weights of {claimed} bytes, and holds {stored}")


@contextmanager
def _watched(limit: int) -> Iterator[None]:
    """Stops a network that this thread makes beyond `limit` parameters: what loops over 10**9 blocks never ends."""
    count = 0

    def watch(parameter: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise UserError("it has far more parameters than the file")

    with _at_registration(watch):
        yield


def _parameters_on_meta() -> AbstractContextManager[None]:
    """Networks that this thread makes get real buffers, and parameters that nobody fills with numbers."""
    return _at_registration(lambda parameter: nn.Parameter(parameter.to("meta"), parameter.requires_grad))


@contextmanager
def _at_registration(hook: Callable[[nn.Parameter], nn.Parameter | None]) -> Iterator[None]:
    """Has `hook` called with, and where it gives one replace, every parameter that a module of this thread gets."""
    thread = threading.get_ident()

    def in_this_thread(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        return hook(parameter) if threading.get_ident() == thread else None

    handle = register_module_parameter_registration_hook(cast(Callable[..., None], in_this_thread))
    try:
        yield
    finally:
        handle.remove()
