"""Several processes that do one job: their group, what they tell each other, and errors of one that end them all."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment

from grn.cli import explain
from grn.errors import UserError
from grn.launch import place

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # ranks wait for each other while they read a split or make their last samples


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
            first = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])
            number = int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
            os.environ.setdefault("MASTER_ADDR", first)
            os.environ.setdefault("MASTER_PORT", str(15000 + number % 10000))
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=TIMEOUT)
        atexit.register(dist.destroy_process_group)
    return device


def gather(value: T) -> list[T]:
    """`value` of every rank (anything that can be pickled), in the order of the ranks; every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[T] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """Ranks part for the body, in which none may wait for another, and meet again at its end, also after an error.

    So an error of one rank ends all of them at once, where the others would wait for it until the timeout.

    Raises:
        UserError: another rank could not do its part; it says which, and why.
    """
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
