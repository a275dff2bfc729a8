"""Attention patterns of the text refiner (docs/method.md#text-conditional-refiner).

Every pattern here is called with queries, keys and values [B, heads, N, head_dim] and returns what attention makes of
them, like the queries; keys and values may have fewer heads, each shared by a group of the queries' heads. None is
compared by its fields (`eq=False`): Dynamo would ask for a hash before they are there.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Pattern = Callable[[Tensor, Tensor, Tensor], Tensor]
Backend = Literal["exact", "flex"]

BLOCK = 128  # tokens, queries and keys alike: what flex attention skips or computes as a whole


def packed_attention(
    lengths: Sequence[tuple[int, int]], device: torch.device, *, backend: Backend | None = None
) -> Pattern:
    """The pattern of samples packed into one sequence (B = 1), each its visual tokens first, then its text.

    Visual tokens attend to all of their sample, text to the sample's text, nothing to another sample.

    Args:
        lengths: (visual tokens, text tokens) of every sample; either may be 0.
        backend: `exact` (scaled_dot_product_attention sample by sample: any device) or `flex` (flex_attention compiled
            for the device, one kernel); None: flex where it has gradients, which CPU and MPS have not.
    """
    if backend is None:
        backend = "exact" if device.type in ("cpu", "mps", "meta") else "flex"
    if backend == "exact":
        return PackedExact(tuple(lengths))
    return PackedFlex(packed_block_mask(lengths, device), compiled=True)


@dataclass(frozen=True, eq=False)
class PackedExact:
    """`packed_attention` sample by sample."""

    lengths: tuple[tuple[int, int], ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Splits, not slices: the gradient of a slice is as large as the whole sequence, for every sample.
        queries = q.split([count for sample in self.lengths for count in sample], dim=2)
        samples = [sum(sample) for sample in self.lengths]
        outputs = []
        for i, (keys, values) in enumerate(zip(k.split(samples, dim=2), v.split(samples, dim=2))):
            visual, text = self.lengths[i]
            if visual:
                outputs.append(_attention(queries[2 * i], keys, values))
            if text:
                outputs.append(_attention(queries[2 * i + 1], keys[:, :, visual:], values[:, :, visual:]))
        return torch.cat(outputs, dim=2)


@dataclass(frozen=True, eq=False)
class PackedFlex:
    """`packed_attention` by flex attention; not compiled it materialises all scores, which is for tests."""

    mask: BlockMask
    compiled: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = _flex_attention
        if self.compiled and not torch.compiler.is_compiling():  # a compiled block fuses what is in it
            modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled(q.device.type)
            attend = _fused_flex_attention(q.dtype, q.device, q.shape[1], k.shape[1], q.shape[3], *modes)
        return attend(q, k, v, self.mask)


@dataclass(frozen=True, eq=False)
class WithText:
    """Dense batches: every token attends to all of its row, and to the keys and values of the row's text.

    Args:
        keys, values: [B, kv_heads, L, head_dim].
        mask: bool [B, 1, 1, L], False where a shorter text has ended; None where all are of the same length.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None
        if self.mask is not None:
            own = self.mask.new_ones(len(q), 1, 1, k.shape[2])
            mask = torch.cat([own, self.mask], dim=3).expand(-1, -1, q.shape[2], -1)
        k, v = torch.cat([k, self.keys.to(k.dtype)], dim=2), torch.cat([v, self.values.to(v.dtype)], dim=2)
        return _attention(q, k, v, mask)


@dataclass(frozen=True, eq=False)
class Padded:
    """Dense batches: every token attends to all of its row but padding.

    Args:
        mask: bool [B, 1, 1, N], False where a row's token is padding; None where there is none.
    """

    mask: Tensor | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask.expand(-1, -1, q.shape[2], -1)
        return _attention(q, k, v, mask)


class Recorder:
    """Another pattern, whose last keys and values are kept; one a block, all alike to a compiled one.

    No dataclass: FSDP, which casts a block's inputs, would hand the block a copy of one.
    """

    def __init__(self, pattern: Pattern):
        self.pattern = pattern
        self.keys: Any = None  # a tensor once it was called
        self.values: Any = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys, self.values = k, v
        return self.pattern(q, k, v)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if (group := q.shape[1] // k.shape[1]) > 1:  # not `enable_gqa`, which leaves only the slowest kernel with a mask
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@cache
def _fused_flex_attention(*_: Hashable) -> Callable[..., Tensor]:
    """`_flex_attention` compiled, for calls of one kind: of all that Dynamo compiles anew for, but the samples' sizes.

    Dynamo compiles a function eight times at most and then runs it as it is, which would materialise all scores: 60 GB
    at 40 960 tokens. It counts by code objects, so each kind gets its own; with `fullgraph` the limit is an error.
    """
    attend = FunctionType(_flex_attention.__code__.replace(), globals())
    return torch.compile(attend, fullgraph=True)


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])


def packed_block_mask(lengths: Sequence[tuple[int, int]], device: torch.device) -> BlockMask:
    """The mask of `packed_attention` for flex attention.

    Blocks are told apart from the samples at their edges: `create_block_mask` would look at all pairs of tokens, 1.7
    billion of them in 40 960 tokens.
    """
    counts = torch.tensor(lengths, device="cpu").view(-1, 2)
    sample = torch.arange(len(counts), device="cpu").repeat_interleave(counts.sum(dim=1))
    is_text = torch.tensor([False, True], device="cpu").repeat(len(counts)).repeat_interleave(counts.flatten())
    total = len(sample)
    blocks = -(-total // BLOCK)

    start = torch.arange(blocks, device="cpu") * BLOCK
    end = (start + BLOCK).clamp(max=total) - 1
    first, last = sample[start], sample[end]  # sorted: a block holds all samples between
    texts = torch.cat([torch.zeros(1, dtype=torch.long, device="cpu"), is_text.long().cumsum(0)])
    texts = texts[end + 1] - texts[start]
    only_text, no_text = texts == end - start + 1, texts == 0
    meet = (first[:, None] <= last) & (first <= last[:, None]) & ~(only_text[:, None] & no_text)
    whole = (first == last) & (end - start + 1 == BLOCK)
    full = (first[:, None] == first) & whole[:, None] & whole & (only_text | no_text[:, None])

    device_sample, device_is_text = (table.to(device, non_blocking=True) for table in (sample, is_text))

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (device_sample[query] == device_sample[key]) & (device_is_text[key] | ~device_is_text[query])

    mask = BlockMask.from_kv_blocks(
        *_listed(meet & ~full), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(total, total)
    )
    for name, table in vars(mask).items():  # `mask.to` would wait until the device has done all before
        if isinstance(table, Tensor):
            setattr(mask, name, table.to(device, non_blocking=True))
    return mask


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [queries, keys] -> how many in each row, int32 [1, 1, queries]; which, first in each row of [1, 1, ...]."""
    order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(dim=1, dtype=torch.int32)[None, None], order.int()[None, None]
