"""Errors of torch that are not the code's: one line that names the remedy."""

import os
import signal
import time

import commands
import numpy as np
import pytest
import torch
import torch.distributed as dist

from grn.runtime.failures import named


class Fatal(torch.utils.data.Dataset):
    """Kills the worker that reads it."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker():
    with pytest.raises(RuntimeError) as error:
        list(torch.utils.data.DataLoader(Fatal(), num_workers=1))
    assert "lower data.num_workers" in named(error.value)
    assert named(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def _rank(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dist.barrier()
    if rank == 1:
        os._exit(0)
    time.sleep(0.5)
    with pytest.raises(RuntimeError) as error:
        dist.all_reduce(torch.ones(3))
    assert "another process of this command ended" in named(error.value)
    os._exit(0)


def test_a_killed_rank(tmp_path):
    commands.spawn(_rank, (str(tmp_path / "store"),), nprocs=2)


def test_memory_that_is_not_there():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert "lower the batch size" in named(error.value)
    with pytest.raises(MemoryError) as error:
        np.empty(2**60, dtype=np.uint8)
    assert "lower the batch size" in named(error.value)
    assert "lower the batch size" in named(MemoryError())
    assert "activation_checkpointing=full" in named(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
