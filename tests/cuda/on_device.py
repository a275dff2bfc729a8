"""What tests of tests/cuda share: the device they run on."""

import os
from contextlib import contextmanager

import torch

# GRN_TEST_DEVICE=cpu runs the same tests where there is no GPU, to mend the tests themselves: they prove nothing there.
DEVICE = torch.device(os.environ.get("GRN_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
IS_THERE = not ON_GPU or torch.cuda.is_available()


def on(device, *values):
    """Tensors, and lists, tuples and dicts of some, on a device."""
    moved = [
        value.to(device)
        if isinstance(value, torch.Tensor)
        else {name: on(device, part) for name, part in value.items()}
        if isinstance(value, dict)
        else type(value)(on(device, part) for part in value)
        if isinstance(value, (list, tuple))
        else value
        for value in values
    ]
    return moved[0] if len(moved) == 1 else moved


def in_bfloat16(enabled=True):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled)


@contextmanager
def never_waiting():
    """Whatever would have the host wait for the GPU raises."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def distance(found, expected):
    """Norm of the difference, over the norm of what is expected."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return ((found - expected).norm() / expected.norm()).item()
