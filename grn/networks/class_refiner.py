"""The class-conditional refiner: a transformer over a corrupted token map, t and a class label.

docs/method.md#class-conditional-refiner has its formulas.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grn.method.corruption import mean_scores
from grn.networks.layers import (
    EPS,
    HeadLinear,
    Initialized,
    RMSNorm,
    TimeEmbedding,
    at_least_float32,
    in_chunks,
    ones_at,
    without_autocast,
)
from grn.networks.rotary import rotary_2d, rotate
from grn.runtime.errors import UserError, check_count
from grn.weights.pretrained import Pretrained

MAX_SIZE = 128  # 2048 pixels at stride 16; tables grow with it, and no weight in an exported file vouches for it


class ClassRefiner(Pretrained, Initialized):
    """Predicts every true token of a corrupted map; `from_pretrained` loads a trained one.

    Args:
        channels: D, tokens a position.
        classes: values a token can take.
        num_labels: class labels; label `num_labels` is the null class.
        size: positions a side, up to 128.
        depth, width, heads: of the transformer.
        bottleneck: width of the first linear map on the one-hot tokens.
        context_start: the block before which the in-context tokens are prepended.
        context_tokens: how many; 0 for none.
        mlp_ratio: the SwiGLU's hidden width is int(mlp_ratio * width * 2/3).

    Raises:
        UserError: sizes that do not fit together.
    """

    scores_targets = True  # `forward` takes `targets` and `loss_chunk`

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        num_labels: int,
        size: int,
        depth: int,
        width: int,
        heads: int,
        bottleneck: int,
        context_start: int,
        context_tokens: int = 32,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        sizes = {"channels": channels, "classes": classes, "num_labels": num_labels, "size": size, "depth": depth}
        for name, value in (sizes | {"width": width, "heads": heads, "bottleneck": bottleneck}).items():
            check_count(f"model.{name}", value, most=MAX_SIZE if name == "size" else None)
        if width % (4 * heads):
            raise UserError(f"model.width={width} must be a multiple of 4 * model.heads={heads} (2-D rotary positions)")
        if context_tokens and not (isinstance(context_start, int) and 0 <= context_start < depth):
            raise UserError(
                f"model.context_start={context_start} must be a block, 0..{depth - 1} (model.depth={depth}); "
                "model.context_tokens=0 leaves the context tokens out"
            )
        self.channels, self.classes, self.num_labels, self.size = channels, classes, num_labels, size
        self.width, self.head_dim = width, width // heads
        self.context_start, self.context_tokens = context_start, context_tokens

        self.token_embedding = TokenEmbedding(channels, classes, bottleneck, width)
        self.time_embedding = TimeEmbedding(width)
        self.label_embedding = nn.Embedding(num_labels + 1, width)
        # Of none, DDP would wait for a gradient that never comes.
        self.context_position = nn.Parameter(torch.empty(context_tokens, width), requires_grad=context_tokens > 0)
        self.blocks = nn.ModuleList(Block(width, heads, int(mlp_ratio * width * 2 / 3)) for _ in range(depth))
        self.head = Head(width, classes * channels)
        for name, table in self._tables().items():
            self.register_buffer(name, table.to(torch.get_default_device()), persistent=False)
        self.init_weights()

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        loss_chunk: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the true tokens; or, told these, how well they are predicted.

        Args:
            tokens: int64 [B, D, 1, size, size] in 0..classes-1.
            t: float [B], the signal ratio.
            labels: int64 [B] in 0..num_labels.
            targets: the true tokens, like `tokens`.
            loss_chunk: with targets, of how many positions there are logits at a time, in whole samples; None: of all.

        Returns:
            float32 [B, classes, D, 1, size, size]; float64 of a network in float64. With targets, each sample's
            (mean cross-entropy in nats a token, accuracy), float32 [B] each.
        """
        batch, _, frames, height, width = tokens.shape
        if tokens.shape[1:] != (self.channels, 1, self.size, self.size):
            raise ValueError(
                f"tokens must be [B, {self.channels}, 1, {self.size}, {self.size}], got {list(tokens.shape)}"
            )
        label = self.label_embedding(labels)
        condition = F.silu(self.time_embedding(t) + label)
        x = self.token_embedding(tokens) + self.position
        rotation = self.cos, self.sin
        for i, block in enumerate(self.blocks):
            if i == self.context_start and self.context_tokens:
                context = label[:, None] + self.context_position
                x = torch.cat([context.to(x.dtype), x], dim=1)
                rotation = self.context_cos, self.context_sin
            x = block(x, condition, *rotation)
        x = x[:, -height * width :]
        if targets is not None:
            samples = batch if loss_chunk is None else max(1, loss_chunk // (height * width))
            return self.head(x, condition, targets.flatten(2).transpose(1, 2), samples)
        logits = self.head(x, condition)
        return logits.view(batch, frames, height, width, self.classes, self.channels).permute(0, 4, 5, 1, 2, 3)

    def initializers(self, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Callable]]:
        normal = functools.partial(nn.init.normal_, std=0.02, generator=generator)
        xavier = functools.partial(nn.init.xavier_uniform_, generator=generator)
        fills: dict[nn.Module, Callable] = {}
        fills |= dict.fromkeys((self.time_embedding.first, self.time_embedding.second), normal)
        # adaLN-zero: every block starts as the identity, the head at zero logits.
        modulated: list[Any] = [*self.blocks, self.head]
        fills |= dict.fromkeys((self.head.out, *(module.modulation for module in modulated)), nn.init.zeros_)
        for name, table in self._tables().items():
            yield getattr(self, name), functools.partial(Tensor.copy_, other=table)
        yield from self.layer_initializers(fills, xavier)
        yield self.label_embedding.weight, normal
        yield self.context_position, normal

    def _tables(self) -> dict[str, Tensor]:
        """Fixed position tables; the context tokens are not rotated (cos 1, sin 0).

        They are on the CPU, in float64 on the way; on the meta device, where nothing is to be allocated, only shapes.
        """
        with torch.device("meta" if torch.get_default_device().type == "meta" else "cpu"):
            cos, sin = rotary_2d(self.size, self.size, self.head_dim)
            still = torch.ones(self.context_tokens, cos.shape[1])
            return {
                "position": sincos_position(self.size, self.width),
                "cos": cos,
                "sin": sin,
                "context_cos": torch.cat([still, cos]),
                "context_sin": torch.cat([torch.zeros_like(still), sin]),
            }


class TokenEmbedding(nn.Module):
    """One-hot tokens (class-major) -> bottleneck (no bias) -> width: int64 [B, D, T, H, W] -> [B, THW, width]."""

    def __init__(self, channels: int, classes: int, bottleneck: int, width: int):
        super().__init__()
        self.channels = channels
        self.squeeze = nn.Linear(classes * channels, bottleneck, bias=False)
        self.expand = nn.Linear(bottleneck, width)

    def forward(self, tokens: Tensor) -> Tensor:
        channel = torch.arange(self.channels, device=tokens.device)
        index = tokens.flatten(2).transpose(1, 2) * self.channels + channel
        return self.expand(self.squeeze(ones_at(index, self.squeeze)))


class Block(nn.Module):
    """Attention and SwiGLU, each behind RMSNorm and adaLN-zero (shift, scale, gate)."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = RMSNorm(width, eps=EPS)
        self.attention = Attention(width, heads)
        self.norm2 = RMSNorm(width, eps=EPS)
        self.mlp = SwiGLU(width, hidden)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Attention(nn.Module):
    """Self-attention with per-head RMSNorm on queries and keys, and rotary positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads, eps=EPS)
        self.k_norm = RMSNorm(width // heads, eps=EPS)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # In float32 (or float64) from norm to rotation: under bf16 autocast, RMSNorm has no kernel for two dtypes.
        q = rotate(self.q_norm(at_least_float32(q)), cos, sin).to(v.dtype)
        k = rotate(self.k_norm(at_least_float32(k)), cos, sin).to(v.dtype)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_and_value = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class Head(nn.Module):
    """adaLN (shift, scale) RMSNorm and the linear map to class-major logits; all of it in float32, also under autocast.

    x [B, N, width], condition [B, width], of any float type -> [B, N, out], float32 (float64 of a float64). With
    targets int64 [B, N, D] -> what `mean_scores` says of each sample, of whose logits there are those of `samples` at
    a time, going and coming back: here, for a strategy gathers weights around this call.
    """

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm = RMSNorm(width, eps=EPS)
        self.modulation = HeadLinear(width, 2 * width)
        self.out = HeadLinear(width, out)

    def forward(
        self, x: Tensor, condition: Tensor, targets: Tensor | None = None, samples: int = 1
    ) -> Tensor | tuple[Tensor, Tensor]:
        with without_autocast(x.device):
            shift, scale = self.modulation(at_least_float32(condition))[:, None].chunk(2, dim=-1)
            if targets is None:
                return self._logits(x, shift, scale)
            return in_chunks(self._scores, samples, x, shift, scale, targets)

    def _logits(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.out(self.norm(at_least_float32(x)) * (1 + scale) + shift)

    def _scores(self, x: Tensor, shift: Tensor, scale: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._logits(x, shift, scale).unflatten(-1, (-1, targets.shape[-1]))  # [b, N, classes, D]
        return mean_scores(logits.transpose(1, 2).flatten(2), targets.flatten(1))


def sincos_position(size: int, width: int) -> Tensor:
    """Fixed 2-D positions float32 [size*size, width]: the first half tells the column, the second the row; in each half
    sines before cosines, base 1e4."""
    frequencies = 1e4 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(size, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = line.repeat(size, 1), line.repeat_interleave(size, dim=0)
    return torch.cat([columns, rows], dim=1).float()
