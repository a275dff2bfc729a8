"""A GPU for machines without: tensors on "cuda" have shapes and dtypes and no data, those on the CPU are real.

    with FakeCuda() as fake:
        network = Network().to("cuda")
        network(torch.zeros(2, 3, device="cuda"))
    fake.waits  # operators for which the host would have waited until the GPU had done all before, and where

What needs numbers that are on the GPU (`.item()`, `.tolist()`, `if tensor`) cannot go on and raises.
"""

import traceback
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grn.networks import attention

aten = torch.ops.aten
ROOT = Path(__file__).parents[1]
# Their results' sizes hang on numbers.
SIZED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}


class FakeCuda(TorchDispatchMode):
    """See above; `torch.autocast("cuda")`, which is off without a GPU, acts in it.

    Attributes:
        waits: (operator, file and line within the project), in their order.
    """

    def __init__(self):
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[tuple[str, str]] = []

    def __enter__(self):
        self._patches = [
            mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False),
            mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
            mock.patch.object(torch.cuda, "current_device", return_value=0),
            # Nothing is compiled within a mode; its results are of the same kind.
            mock.patch.object(
                attention, "_fused_flex_attention", return_value=lambda q, k, v, _: attention._attention(q, k, v)
            ),
        ]
        for patch in self._patches:
            patch.start()
        self._fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._fake.__exit__(*error)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return torch.device("meta")  # for C++ alone: autograd would look for the GPU's threads
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs = kwargs | {"device": torch.device("cuda")}  # as C++ has just been told
        leaves = tree_leaves((args, kwargs))
        there = [isinstance(leaf, FakeTensor) and leaf.device.type == "cuda" for leaf in leaves]
        device = kwargs.get("device")
        goes = device is not None and torch.device(device).type == "cuda"
        if not any(there) and not goes and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if self._waits(func, args, kwargs, any(there), device):
            self.waits.append((str(func), _here()))
        return func(*args, **kwargs)

    @staticmethod
    def _waits(func, args, kwargs, there, device):
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
            return False
        if func in SIZED_BY_VALUES or func is aten._local_scalar_dense.default:
            return there
        if func is aten.index.Tensor or func is aten.index_put_.default:
            return there and any(it is not None and it.dtype in (torch.bool, torch.uint8) for it in args[1])
        if func is aten._to_copy.default:
            moves = device is not None and torch.device(device).type != args[0].device.type
            return moves and not kwargs.get("non_blocking", False)
        if func is aten.copy_.default:
            into, source = args[:2]
            return into.device.type != source.device.type and not (args[2] if len(args) > 2 else False)
        return False


def _here():
    """The innermost line of the project."""
    for frame in reversed(traceback.extract_stack()):
        if f"{ROOT}/grn/" in frame.filename:
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} {frame.line}"
    return "outside of grn"
