"""Rank and world size, as torchrun or srun started the processes; their group, and what they tell each other.

Torch is imported only where a group is needed: commands ask for their rank before they import anything heavy.
"""

from __future__ import annotations

import atexit
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from grn.runtime.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# torchrun's variables; and srun's, of which the last is not there in a batch script that srun did not start.
LAUNCHERS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
)
TIMEOUT = timedelta(minutes=30)  # ranks wait for each other while they read a split or make their last samples


def place() -> tuple[int, int, int]:
    """(rank, rank on this machine, ranks); (0, 0, 1) where nobody started several.

    Raises:
        UserError: the launcher's variables are no such numbers.
    """
    for names in LAUNCHERS:
        if all(name in os.environ for name in names):
            given = [os.environ[name] for name in names]
            if not all(value.isdecimal() for value in given) or not int(given[0]) < int(given[2]):
                told = ", ".join(f"{name}={value}" for name, value in zip(names, given))
                raise UserError(f"{told} are no rank, local rank and number of processes: unset them, or use torchrun")
            return int(given[0]), int(given[1]), int(given[2])
    return 0, 0, 1


def is_first() -> bool:
    """Whether this process speaks and writes for all, also of those that Lightning starts."""
    return place()[0] == 0 and all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK"))


def rank_and_world_size() -> tuple[int, int]:
    """Of the process group where there is one (Lightning's, torchrun's)."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def join(device: torch.device) -> torch.device:
    """Joins the processes that torchrun or srun started, and gives this one its device; alone, does nothing.

    The group talks over gloo for what lies on the CPU, and over the accelerator's own backend for what lies there.

    Args:
        device: what every process computes on; of an accelerator, each takes the one of its local rank.

    Raises:
        UserError: a single accelerator was named for several processes.
    """
    rank, local_rank, world_size = place()
    if world_size == 1:
        return device
    import torch
    import torch.distributed as dist

    backend = dist.get_default_backend_for_device("cpu")
    if device.type != "cpu":
        if device.index is not None:
            raise UserError(
                f"device={device} is one accelerator, but {world_size} processes were started: device={device.type} "
                "gives each its own"
            )
        device = torch.device(device.type, local_rank % torch.accelerator.device_count())
        torch.accelerator.set_device_index(device.index)
        backend = f"cpu:{backend},{device.type}:{dist.get_default_backend_for_device(device)}"
    if not dist.is_initialized():  # a sweep's points share the group
        if "SLURM_STEP_NODELIST" in os.environ:  # torchrun says where to meet, srun does not
            from lightning.fabric.plugins.environments import SLURMEnvironment

            first = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])
            number = int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
            os.environ.setdefault("MASTER_ADDR", first)
            os.environ.setdefault("MASTER_PORT", str(15000 + number % 10000))
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=TIMEOUT)
        atexit.register(dist.destroy_process_group)
    return device


def gather(value: T) -> list[T]:
    """`value` of every rank (anything that can be pickled), in the order of the ranks; every rank must call it."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """The sums of `counts` over all ranks, by their names; every rank must call it."""
    return dict(sum(map(Counter, gather(counts)), Counter()))


@contextmanager
def together() -> Iterator[None]:
    """Ranks part for the body, in which none may wait for another, and meet again at its end, also after an error.

    So an error of one rank ends all of them at once, where the others would wait for it until the timeout.

    Raises:
        UserError: another rank could not do its part; it says which, and why.
    """
    from grn.runtime.failures import explain

    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    told = gather(None if error is None else explain(error) or type(error).__name__)
    if error is not None:
        raise error
    for rank, message in enumerate(told):
        if message is not None:
            raise UserError(f"rank {rank}: {message}")
