"""The text-conditional refiner of images and video: a transformer over visual, time and text tokens.

docs/method.md#text-conditional-refiner has its formulas.

The same weights run in two forms. `forward` trains: samples of any sizes, packed into one sequence without padding.
`predict` samples: batches of one size, on what `text_cache` computes once of their texts.

Who attends to whom is no matter of weights, so that weights of one scheme load into the other and draw garbage:

- `full`: every token of a sample attends to all of the sample. Texts run through all blocks at every step, since what
  is on the map changes them. The authors' weights since June 2026 (`..._FSA_...`).
- `one_way`: visual tokens and the time token attend to all of their sample, text to text alone, so that its keys and
  values are computed once for all steps. The authors' first release.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from grn.method.corruption import mean_scores
from grn.method.resolutions import nearest_template, rotary_span
from grn.networks.attention import Backend, Padded, Pattern, Recorder, WithText, packed_attention
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
from grn.networks.rotary import ROWS_3D, rotary_3d, rotate
from grn.runtime.errors import UserError, check_count
from grn.weights.pretrained import Pretrained

TIME_POSITION, FIRST_FRAME = 512, 600  # of the time token and of frame 0, along time; text counts from 0
MAX_FRAMES = ROWS_3D[0] - FIRST_FRAME  # of latents
HIDDEN_UNIT = 256

Scheme = Literal["one_way", "full"]
Initialization = Literal["normal", "zero_head"]


@dataclass(frozen=True)
class TextCache:
    """What all steps share of S texts, and how long each is.

    inputs: [S, longest, width], what goes into the blocks with the other tokens (`full`), or None. keys, values: a
    tensor [S, kv_heads, longest, head_dim] a block (`one_way`), or none.
    """

    lengths: tuple[int, ...]
    inputs: Tensor | None = None
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)


class TextRefiner(Pretrained, Initialized):
    """Predicts every true token of corrupted maps from their texts; `from_pretrained` loads a trained one.

    Args:
        channels: D, tokens a position.
        classes: values a token can take.
        depth, width, heads: of the transformer.
        attention: `full` or `one_way`, which the weights were trained with; nothing in them tells.
        kv_heads: heads of keys and values, each shared by a group of heads; None: as many as `heads`.
        mlp_ratio: the SwiGLU's hidden width is round(mlp_ratio * width / 256) * 256.
        text_width: of the text encoder's features.
        max_text: text tokens a sample, at most 512.
        initialization: of linear layers, `normal`: N(0, 0.02) for all of them, the head's too, as the authors do; or
            `zero_head`: Xavier, what blocks add to the stream scaled by 1/sqrt(2 * depth), and a head of zeros. Biases
            are 0 and norms 1 in both.

    Raises:
        UserError: sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        depth: int,
        width: int,
        heads: int,
        attention: Scheme,
        kv_heads: int | None = None,
        mlp_ratio: float = 3.55,
        text_width: int = 4096,
        max_text: int = TIME_POSITION,
        initialization: Initialization = "normal",
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        sizes = {"channels": channels, "classes": classes, "depth": depth, "width": width, "heads": heads}
        for name, value in (sizes | {"kv_heads": kv_heads, "text_width": text_width, "max_text": max_text}).items():
            check_count(f"model.{name}", value)
        if width % (2 * heads) or width // heads < 6:
            raise UserError(
                f"model.width={width} must be a multiple of 2 * model.heads={heads}, and at least 6 a head (3-D rotary "
                "positions)"
            )
        if heads % kv_heads:
            raise UserError(f"model.kv_heads={kv_heads} must divide model.heads={heads}")
        if max_text > TIME_POSITION:
            raise UserError(f"model.max_text={max_text} must be at most {TIME_POSITION}, the time token's position")
        if attention not in get_args(Scheme):
            raise UserError(
                f"model.attention={attention}: {' or '.join(get_args(Scheme))}, as its weights were trained"
            )
        hidden = round(mlp_ratio * width / HIDDEN_UNIT) * HIDDEN_UNIT
        if hidden < 1:
            raise UserError(f"model.mlp_ratio={mlp_ratio} leaves nothing of model.width={width}, in units of 256")
        if initialization not in get_args(Initialization):
            raise UserError(f"model.initialization={initialization}: {' or '.join(get_args(Initialization))}")
        self.initialization: Initialization = initialization
        self.channels, self.classes = channels, classes
        self.attention: Scheme = attention
        self.width, self.head_dim = width, width // heads
        self.text_width, self.max_text = text_width, max_text

        self.token_embedding = TokenEmbedding(channels, classes, width)
        self.time_embedding = TimeEmbedding(width)
        self.text_projection = nn.Linear(text_width, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, hidden) for _ in range(depth))
        self.head = Head(width, channels * classes)
        self.init_weights()

    def forward(
        self,
        tokens: Sequence[Tensor],
        t: Tensor,
        text: Tensor,
        text_lengths: Sequence[int],
        *,
        templates: Sequence[float] | None = None,
        context_frames: int | Sequence[int] = 0,
        backend: Backend | None = None,
        targets: Sequence[Tensor] | None = None,
        loss_chunk: int | None = None,
    ) -> list[Tensor] | tuple[Tensor, Tensor]:
        """Logits of samples of any sizes, packed into one sequence; no sample sees another. Or, told the true tokens,
        how well they are predicted.

        Args:
            tokens: S times int64 [D, T, H, W] in 0..classes-1.
            t: float [S], the signal ratios.
            text: float [sum of text_lengths, text_width], text after text.
            text_lengths: S, each in 1..max_text.
            templates: S height/width templates (grn.method.resolutions); None: the nearest to each H/W.
            context_frames: how many latents at the start of each sample are a condition, with their true tokens
                (image to video); one number for all, or S.
            backend: as in `grn.networks.attention.packed_attention`.
            targets: the true tokens, S times int64 [D, T - context frames, H, W].
            loss_chunk: with targets, of how many positions there are logits at a time; None: of all.

        Returns:
            S times float32 [classes, D, T - context frames, H, W]; float64 of a network in float64. With targets, each
            sample's (mean cross-entropy in nats a token, accuracy), float32 [S] each.
        """
        shapes = [tuple(sample.shape[1:]) for sample in tokens]
        count = len(shapes)
        context = [context_frames] * count if isinstance(context_frames, int) else list(context_frames)
        templates = [nearest_template(*shape[1:]) for shape in shapes] if templates is None else list(templates)
        if not count == len(t) == len(text_lengths) == len(templates) == len(context):
            raise ValueError(f"{count} samples have {len(t)} signal ratios, {len(text_lengths)} texts, "
                             f"{len(templates)} templates, {len(context)} context frames")  # fmt: skip
        for sample, frames in zip(tokens, context):
            self._check_tokens(sample[None], frames)
        self._check_text(text, text_lengths)

        visual = self.token_embedding(torch.cat([sample.flatten(1).T for sample in tokens]))
        sizes = [frames * height * width for frames, height, width in shapes]
        pieces = visual.split(sizes), self.time_embedding(t).split(1), self.text_projection(self._input(text)).split(
            list(text_lengths)
        )  # fmt: skip
        x = self._stream(torch.cat([piece for sample in zip(*pieces) for piece in sample]))[None]
        positions = torch.cat(
            [
                piece
                for shape, template, length in zip(shapes, templates, text_lengths)
                for piece in (
                    visual_positions(*shape, template=template),
                    time_positions([TIME_POSITION]),
                    _of_text(length),
                )
            ]
        )
        lengths = [(size + 1, length) for size, length in zip(sizes, text_lengths)]
        x = self._run(x, positions, [self._packed(lengths, x.device, backend)] * len(self.blocks))

        kept = [(frames, (shape[0] - frames, *shape[1:])) for frames, shape in zip(context, shapes)]
        counts = [
            number
            for (frames, (left, height, width)), length in zip(kept, text_lengths)
            for number in (frames * height * width, left * height * width, 1 + length)
        ]
        predicted = torch.cat(x[0].split(counts)[1::3])
        if targets is not None:
            true = torch.cat([sample.flatten(1).T for sample in targets])
            scores = self.head(predicted, true, len(true) if loss_chunk is None else loss_chunk)
            entropy, accuracy = (torch.stack([own.mean() for own in it.split(counts[1::3])]) for it in scores)
            return entropy, accuracy
        logits = self.head(predicted)
        return [
            piece.view(*shape, self.channels, self.classes).permute(4, 3, 0, 1, 2)
            for piece, (_, shape) in zip(logits.split(counts[1::3]), kept)
        ]

    def predict(
        self,
        tokens: Tensor,
        t: Tensor,
        text: TextCache,
        rows: Tensor | None = None,
        *,
        template: float | None = None,
        context_frames: int = 0,
    ) -> Tensor:
        """Logits of a batch of samples of one size, as the sampler asks for them.

        Args:
            tokens: int64 [B, D, T, H, W] in 0..classes-1.
            t: float [B], the signal ratios.
            text: of `text_cache`.
            rows: int64 [B], on the CPU: which of the texts is whose; None: they are in the order of the samples.
            template: the height/width template; None: the nearest to H/W.
            context_frames: as in `forward`.

        Returns:
            float32 [B, classes, D, T - context_frames, H, W]; float64 of a network in float64.
        """
        self._check_tokens(tokens, context_frames)
        batch, _, frames, height, width = tokens.shape
        rows = torch.arange(len(text), device="cpu") if rows is None else rows
        if not batch == len(t) == len(rows):
            raise ValueError(f"{batch} samples have {len(t)} signal ratios and {len(rows)} texts")
        template = nearest_template(height, width) if template is None else template

        visual = self.token_embedding(tokens.flatten(2).transpose(1, 2))
        pieces = [visual, self.time_embedding(t)[:, None]]
        positions = [visual_positions(frames, height, width, template), time_positions([TIME_POSITION])]
        if self.attention == "full":
            inputs, longest, mask = _beside(text, rows, visual.shape[1] + 1, visual.device)
            pieces.append(inputs)
            positions.append(_of_text(longest))
            patterns = [Padded(mask)] * len(self.blocks)
        else:
            patterns = _with_texts(text, rows, visual.device)
        x = self._run(self._stream(torch.cat(pieces, dim=1)), torch.cat(positions), patterns)
        logits = self.head(x[:, context_frames * height * width : frames * height * width])
        return logits.view(batch, -1, height, width, self.channels, self.classes).permute(0, 5, 4, 1, 2, 3)

    def text_cache(self, text: Tensor, text_lengths: Sequence[int], *, backend: Backend | None = None) -> TextCache:
        """What all steps share of S texts: with `one_way` attention their keys and values in every block.

        Args:
            text, text_lengths, backend: as in `forward`.
        """
        self._check_text(text, text_lengths)
        lengths = list(text_lengths)
        projected = self.text_projection(self._input(text))
        if self.attention == "full":
            return TextCache(tuple(lengths), inputs=pad_sequence(projected.split(lengths), batch_first=True))
        x = self._stream(projected)[None]
        positions = torch.cat([_of_text(length) for length in lengths])
        pattern = self._packed([(0, length) for length in lengths], x.device, backend)
        recorders = [Recorder(pattern) for _ in self.blocks]
        self._run(x, positions, recorders)

        def padded(packed: Tensor) -> Tensor:
            return pad_sequence(list(packed[0].transpose(0, 1).split(lengths)), batch_first=True).transpose(1, 2)

        return TextCache(
            tuple(lengths),
            keys=tuple(padded(recorder.keys) for recorder in recorders),
            values=tuple(padded(recorder.values) for recorder in recorders),
        )

    def initializers(self, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Callable]]:
        normal = functools.partial(nn.init.normal_, std=0.02, generator=generator)
        xavier = functools.partial(nn.init.xavier_uniform_, generator=generator)
        # What all blocks add to the stream stays as large as the stream, however many they are.
        gain = (2 * len(self.blocks)) ** -0.5
        fills: dict[nn.Module, Callable] = {}
        blocks: list[Any] = list(self.blocks)
        other = normal
        if self.initialization == "zero_head":
            fills |= dict.fromkeys((self.time_embedding.first, self.time_embedding.second), normal)
            fills[self.head.out], other = nn.init.zeros_, xavier
            for block in blocks:
                fills |= dict.fromkeys((block.attention.out, block.mlp.out), functools.partial(xavier, gain=gain))
        yield from self.layer_initializers(fills, other)

    def _packed(self, lengths: Sequence[tuple[int, int]], device: torch.device, backend: Backend | None) -> Pattern:
        """The pattern of packed samples of (visual and time tokens, text tokens)."""
        if self.attention == "full":  # as if all of a sample were visual
            lengths = [(sum(sample), 0) for sample in lengths]
        return packed_attention(lengths, device, backend=backend)

    def _run(self, x: Tensor, positions: Tensor, patterns: Iterable[Pattern]) -> Tensor:
        cos, sin = rotary_3d(positions, self.head_dim, device=x.device)
        for block, pattern in zip(self.blocks, patterns, strict=True):
            x = block(x, cos, sin, pattern)
        return x

    def _input(self, features: Tensor) -> Tensor:
        """In the weights' type, whatever the text encoder's is."""
        return features.to(self.text_projection.weight.dtype)

    def _stream(self, x: Tensor) -> Tensor:
        """In float32 under bf16 autocast, as the norms want it, also where FSDP makes the weights bfloat16; else in the
        weights' type."""
        device = x.device.type
        mixed = device != "meta" and torch.is_autocast_enabled(device)  # that knows no autocast
        return x.float() if mixed else self._input(x)

    def _check_tokens(self, tokens: Tensor, context_frames: int) -> None:
        if tokens.ndim != 5 or tokens.shape[1] != self.channels:
            raise ValueError(f"tokens must be [B, {self.channels}, T, H, W], got {list(tokens.shape)}")
        if not 0 <= context_frames < tokens.shape[2] <= MAX_FRAMES:
            raise ValueError(
                f"{context_frames} context frames of {tokens.shape[2]}: some must be left, of {MAX_FRAMES} at most"
            )

    def _check_text(self, text: Tensor, lengths: Sequence[int]) -> None:
        if text.shape != (sum(lengths), self.text_width):
            raise ValueError(f"text must be {[sum(lengths), self.text_width]}, got {list(text.shape)}")
        if not all(1 <= length <= self.max_text for length in lengths):
            raise ValueError(f"texts must have 1 to {self.max_text} tokens, got {list(lengths)}")


class TokenEmbedding(nn.Module):
    """One-hot tokens (channel-major) -> width: int64 [..., D] -> [..., width]."""

    def __init__(self, channels: int, classes: int, width: int):
        super().__init__()
        self.channels, self.classes = channels, classes
        self.linear = nn.Linear(channels * classes, width)

    def forward(self, tokens: Tensor) -> Tensor:
        index = tokens + torch.arange(self.channels, device=tokens.device) * self.classes
        return self.linear(ones_at(index, self.linear))


class Block(nn.Module):
    """Attention and SwiGLU, each behind RMSNorm: x [B, N, width], cos and sin [N, head_dim/2] -> like x."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int):
        super().__init__()
        self.norm1 = RMSNorm(width, eps=EPS)
        self.attention = Attention(width, heads, kv_heads)
        self.norm2 = RMSNorm(width, eps=EPS)
        self.mlp = SwiGLU(width, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, pattern: Pattern) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin, pattern)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Attention with per-head RMSNorm on queries and keys, and rotary positions; who attends to whom is `pattern`'s."""

    def __init__(self, width: int, heads: int, kv_heads: int):
        super().__init__()
        self.head_dim = width // heads
        self.q = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps=EPS)
        self.k_norm = RMSNorm(self.head_dim, eps=EPS)
        self.out = nn.Linear(heads * self.head_dim, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, pattern: Pattern) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        # In the stream's type from norm to rotation.
        q, k = (
            rotate(norm(heads.to(x.dtype)), cos, sin).to(v.dtype)
            for norm, heads in ((self.q_norm, q), (self.k_norm, k))
        )
        return self.out(pattern(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.value = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x)) * self.value(x))


class Head(nn.Module):
    """RMSNorm and the linear map to channel-major logits; both in float32, also under autocast.

    x [..., width] of any float type -> [..., out], float32 (float64 of a float64). With x [N, width] and targets int64
    [N, D] -> what `mean_scores` says of each position, of whose logits there are those of `positions` at a time, going
    and coming back: here, for a strategy gathers weights around this call.
    """

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm = RMSNorm(width, eps=EPS)
        self.out = HeadLinear(width, out)

    def forward(self, x: Tensor, targets: Tensor | None = None, positions: int = 1) -> Tensor | tuple[Tensor, Tensor]:
        with without_autocast(x.device):
            return self._logits(x) if targets is None else in_chunks(self._scores, positions, x, targets)

    def _logits(self, x: Tensor) -> Tensor:
        return self.out(self.norm(at_least_float32(x)))

    def _scores(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return mean_scores(self._logits(x).unflatten(-1, (targets.shape[-1], -1)).transpose(1, 2), targets)


def visual_positions(frames: int, height: int, width: int, template: float) -> Tensor:
    """Places of a map's tokens, frame by frame and row by row: int64 [T*H*W, 3] of time, row and column.

    Rows and columns are spread over the template's span, the same at every budget of pixels: row i of H stands at
    round(i * (span / H)), half to even, the product in float32 as the authors' weights were trained with; in float64
    one row or column of four of the buckets would come out next to it. Context frames are the first ones, so that
    frame 0 is the first-frame condition where there is one.
    """
    spans = rotary_span(template)
    rows, columns = (
        torch.round(torch.arange(count, dtype=torch.float32, device="cpu") * (span / count)).long()
        for count, span in zip((height, width), spans)
    )
    times = FIRST_FRAME + torch.arange(frames, device="cpu")
    return torch.cartesian_prod(times, rows, columns)


def time_positions(times: Sequence[int]) -> Tensor:
    """Places of tokens that are on no map: int64 [N, 3], rows and columns 0."""
    return F.pad(torch.tensor(times, dtype=torch.long, device="cpu")[:, None], (0, 2))


def _of_text(length: int) -> Tensor:
    return time_positions(range(length))


def _beside(text: TextCache, rows: Tensor, others: int, device: torch.device) -> tuple[Tensor, int, Tensor | None]:
    """Texts to run with `others` tokens before them: ([B, longest, width], longest, mask of all keys)."""
    longest, mask = _longest(text, rows)
    if mask is not None:
        mask = F.pad(mask, (others, 0), value=True).to(device, non_blocking=True)
    assert text.inputs is not None  # of a refiner with `full` attention
    return text.inputs[rows.to(device, non_blocking=True), :longest], longest, mask


def _longest(text: TextCache, rows: Tensor) -> tuple[int, Tensor | None]:
    """(The longest of the rows' texts; bool [B, 1, 1, longest] on the CPU, False where a shorter one has ended, None
    where there is none)."""
    lengths = torch.tensor(text.lengths, device="cpu")[rows]
    longest = int(lengths.max())
    if bool((lengths == longest).all()):
        return longest, None
    return longest, (torch.arange(longest, device="cpu") < lengths[:, None])[:, None, None]


def _with_texts(text: TextCache, rows: Tensor, device: torch.device) -> Iterable[WithText]:
    """The pattern of every block, made when its turn comes: the rows' keys and values are copies."""
    longest, mask = _longest(text, rows)
    mask = None if mask is None else mask.to(device, non_blocking=True)
    chosen = rows.to(device, non_blocking=True)
    for keys, values in zip(text.keys, text.values):
        yield WithText(keys[chosen, :, :longest], values[chosen, :, :longest], mask)
