"""Layers of both refiners, and how their parameters are initialized."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

EPS = 1e-6
TIME_FREQUENCIES = 128


class Initialized(nn.Module):
    """A network whose parameters can be filled one whole one at a time, by somebody who keeps shards only."""

    def initializers(self, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Callable]]:
        """Each parameter and table once, with what fills it, or another tensor of its shape, in place.

        The draws are the same in this order.
        """
        raise NotImplementedError

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """(Re)initializes all parameters and tables, also after `to_empty` on a module made on the meta device."""
        for tensor, fill in self.initializers(generator):
            fill(tensor)

    def layer_initializers(
        self, fills: Mapping[nn.Module, Callable], other: Callable
    ) -> Iterator[tuple[Tensor, Callable]]:
        """Linear layers by `fills`, or `other` where they are not in it, with biases of 0; norms of 1."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                yield module.weight, fills.get(module, other)
                if module.bias is not None:
                    yield module.bias, nn.init.zeros_
            elif isinstance(module, nn.RMSNorm):
                yield module.weight, nn.init.ones_


class TimeEmbedding(nn.Module):
    """t float [B] -> [B, width]: 256 sinusoids of the raw t, cosines first, base 1e4, then a two-layer SiLU MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Linear(2 * TIME_FREQUENCIES, width)
        self.second = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        dtype = torch.promote_types(self.first.weight.dtype, torch.float32)
        steps = torch.arange(TIME_FREQUENCIES, dtype=dtype, device=t.device) / TIME_FREQUENCIES
        angles = t[:, None].to(dtype) * torch.exp(-math.log(1e4) * steps)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(sinusoids)))


class RMSNorm(nn.RMSNorm):
    """In its input's type: under mixed precision the stream is float32, also where FSDP makes the weight bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        # There is no kernel for two dtypes: a chain of operations would take its place.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class HeadLinear(nn.Linear):
    """In its input's type, whatever the weight's is, as `RMSNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def ones_at(index: Tensor, linear: nn.Linear) -> Tensor:
    """The input [..., in_features] of a linear layer that is 1 at the places int64 [..., D] and 0 elsewhere."""
    # A sum of rows of the matrix would need no one-hots, yet embedding_bag's forward and backward took 1.3 to forty
    # times as long as this product (CPU, D*classes = 64..256): its gradient scatters row by row. Forward alone it took
    # 0.2 to 0.6 of the time where the matrix is narrow, of what is 0.03 % of a pass's FLOP.
    weight = linear.weight
    hot = torch.zeros(*index.shape[:-1], weight.shape[1], dtype=weight.dtype, device=index.device)
    return hot.scatter_(-1, index, 1.0)


def in_chunks(score: Callable[..., tuple[Tensor, Tensor]], rows: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """What `score` makes of so many rows of the tensors at a time, joined.

    For the backward pass only the tensors are kept: what `score` has on its way is computed again, chunk by chunk.
    """
    parts = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    # Nothing in a head draws random numbers.
    scored = [checkpoint(score, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    first, second = (torch.cat(values) for values in zip(*scored))
    return first, second


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(device: torch.device) -> AbstractContextManager:
    """As `torch.autocast(..., enabled=False)`, also on the meta device, which knows no autocast."""
    # Not `torch.amp.is_autocast_available`: where Dynamo (of torch 2.11) meets it, it breaks the graph.
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
