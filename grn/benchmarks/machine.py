"""Measures this machine: matrix product rate, time and memory of a call."""

import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


def describe(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "device": str(device),
        "name": _processor() if device.type == "cpu" else torch.get_device_module(device).get_device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # of Linux; elsewhere `platform` knows
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def synchronize(device: torch.device) -> None:
    """Waits until `device` has done all that it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[float]:
    """Median time of each of several calls that are already warm.

    They take turns, so that a machine which slows down for a while does so for all of them.
    """
    rounds = [[seconds(call, device) for call in calls] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*rounds)]


def matmul(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> tuple[Callable[[], Tensor], int]:
    """A large square matrix product to time, and its FLOP: the rate that no network can exceed.

    float32 on an accelerator takes the precision that convolutions have there by default (TF32 where there is one), for
    the two are to be compared.
    """
    if size is None:  # 2048 takes CPUs without instructions for 16 bits ten seconds
        size = 8192 if device.type != "cpu" else 2048 if dtype == torch.float32 else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def product() -> Tensor:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if device.type == "cpu" else "high")
        try:
            return torch.mm(a, b)
        finally:
            torch.set_float32_matmul_precision(precision)

    return product, 2 * size**3


def memory_method(device: torch.device) -> str:
    """How `peak_memory` comes to its number."""
    return "live tensors, without operators' workspaces" if device.type == "cpu" else "the allocator's peak"


def peak_memory(call: Callable[[], Result], device: torch.device, *, held: Iterable[Tensor]) -> tuple[Result, int]:
    """What a call returns, and the bytes it needs at most: `held`, its weights and inputs, and what is alive beside.

    On an accelerator, by its allocator; on a CPU, by the storage of all tensors alive, which the temporaries of a
    compiled call are not.
    """
    held = list(held)
    if device.type == "cpu":
        with LiveTensors(held) as live:
            return call(), live.peak
    synchronize(device)
    before = torch.accelerator.memory_allocated(device)
    torch.accelerator.reset_peak_memory_stats(device)
    result = call()
    synchronize(device)
    return result, storage_bytes(held) + torch.accelerator.max_memory_allocated(device) - before


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind tensors, counted once where they share them."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


class LiveTensors(TorchDispatchMode):
    """Counts, while it is entered, the bytes of all tensors alive among `held` and the results of operators.

    Attributes:
        bytes: now.
        peak: the most so far.
    """

    def __init__(self, held: Iterable[Tensor] = ()):
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._add(held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _add(self, tensors: Iterable[Tensor]) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage not in self._seen:
                self._seen.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._remove, storage.nbytes())
        self.peak = max(self.peak, self.bytes)

    def _remove(self, size: int) -> None:
        self.bytes -= size
