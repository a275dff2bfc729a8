"""The HBQ tokenizer network: a causal 3-D convolutional autoencoder for images and video (docs/method.md#tokenizer).

Video [B, 3, T, H, W] <-> features [B, z, 1 + k, H/s, W/s], where s is the `stride` and T = 1 + `temporal_stride` * k;
an image is T = 1. Nothing looks ahead in time, so a clip goes through at once (`encode`, `decode`) or frame by frame
(`encode_stream`, `decode_stream`) with the same result. In the latter, a `CausalCache` is carried from one chunk to
the next; the modules themselves are stateless. Inside, tensors are channels-last; `for_inference` gains more speed.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from grn.method import hbq
from grn.runtime.errors import UserError, check_count
from grn.weights.pretrained import Pretrained

COLOURS = 3
PATCH = 2  # side of the blocks of pixels that become channels before the first convolution


class HBQTokenizer(Pretrained, nn.Module):
    """Autoencoder with an HBQ bottleneck (docs/method.md#tokenizer); `from_pretrained` loads a trained one.

    Args:
        latent_channels: z, channels of a feature map.
        rounds: M of HBQ, 1..8.
        dim: width of the first encoder stage.
        decoder_dim: width of the last decoder stage.
        multipliers: width of each encoder stage over `dim`; the decoder mirrors them. Two stages or more; all but the
            last halve height and width.
        blocks_per_stage: residual blocks of an encoder stage; a decoder stage has one more.
        temporal: for each stage but the last, whether it halves time too.
        dropout: within the residual blocks.

    Attributes:
        stride: pixels per latent, along height and along width.
        temporal_stride: frames per latent, after the first.

    Raises:
        UserError: sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        latent_channels: int = 16,
        rounds: int = 4,
        dim: int = 160,
        decoder_dim: int = 256,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        blocks_per_stage: int = 2,
        temporal: Sequence[bool] = (False, True, True),
        dropout: float = 0.0,
    ):
        super().__init__()
        multipliers, temporal = tuple(multipliers), tuple(temporal)
        sizes = {
            "latent_channels": latent_channels,
            "dim": dim,
            "decoder_dim": decoder_dim,
            "multipliers": min(multipliers, default=0),
            "blocks_per_stage": blocks_per_stage,
        }
        for name, size in sizes.items():
            check_count(f"model.{name}", size)
        check_count("model.rounds", rounds, most=hbq.MAX_ROUNDS)
        if not 0 <= dropout < 1:
            raise UserError(f"dropout of a tokenizer must be in [0, 1), got {dropout}")
        if len(multipliers) < 2 or len(temporal) != len(multipliers) - 1:
            raise UserError(
                "multipliers needs two stages or more and temporal one entry less, "
                f"got multipliers={list(multipliers)}, temporal={list(temporal)}"
            )
        self.latent_channels, self.rounds = latent_channels, rounds
        self.stride = PATCH * 2 ** len(temporal)
        self.temporal_stride = 2 ** sum(map(bool, temporal))
        self.encoder = Encoder(latent_channels, dim, multipliers, blocks_per_stage, temporal, dropout)
        self.decoder = Decoder(latent_channels, decoder_dim, multipliers, blocks_per_stage + 1, temporal, dropout)

    def forward(self, video: Tensor, *, pad: bool = False) -> tuple[Tensor, Tensor]:
        """Float video [B, 3, T, H, W] in [-1, 1] -> (its reconstruction through HBQ, the features before HBQ).

        Gradients pass straight through the quantizer. `pad` and errors as in `encode`; the reconstruction has the size
        of `video` all the same.
        """
        features = self.encode(video, pad=pad)
        return self.decode(hbq.quantize(features, self.rounds), size=video.shape[2:] if pad else None), features

    def encode(self, video: Tensor, *, pad: bool = False) -> Tensor:
        """Float video [B, 3, T, H, W] in [-1, 1] -> float32 features [B, z, 1 + k, H/s, W/s] in (-1, 1).

        Args:
            pad: take any size, and repeat the last frame, row and column up to `padded_size`; `decode` can crop again.

        Raises:
            UserError: H or W is not a multiple of `stride`, or T not 1 + `temporal_stride` * k; with `pad`, one is 0.
        """
        if pad and video.ndim == 5:
            for axis, size in enumerate(self.padded_size(video.shape[2:]), start=2):
                if video.shape[axis] not in (0, size):
                    places = torch.arange(size, device=video.device).clamp_(max=video.shape[axis] - 1)
                    video = video.index_select(axis, places)
        self.check_video(video.shape)
        return self._encode(video)

    def padded_size(self, size: Sequence[int]) -> tuple[int, int, int]:
        """The least (T, H, W) that can be encoded and is nowhere below `size`, a (T, H, W) of positive numbers."""
        frames, height, width = size
        time, space = self.temporal_stride, self.stride
        return frames + (1 - frames) % time, height + -height % space, width + -width % space

    def decode(self, features: Tensor, *, size: Sequence[int] | None = None) -> Tensor:
        """Features [B, z, 1 + k, h, w] -> video [B, 3, T, h*s, w*s] in about [-1, 1] (not clipped).

        The result has the dtype that the convolutions compute in: bfloat16 under autocast to it.

        Args:
            size: the (T, H, W) of a video that was encoded with `pad`, to which the result is cropped.

        Raises:
            UserError: another number of channels, or features that no video of this `size` has.
        """
        if features.ndim != 5 or features.shape[1] != self.latent_channels:
            raise UserError(
                f"features must be [B, {self.latent_channels}, T, H, W], got {list(features.shape)}; "
                "were they made by another tokenizer or labeling?"
            )
        if size is None:
            return self._decode(features)
        frames, height, width = size
        time, *space = features.shape[2:]
        whole = (1 + (time - 1) * self.temporal_stride, *(side * self.stride for side in space))
        if min(size) < 1 or self.padded_size(size) != whole:
            raise UserError(f"size={tuple(size)} is not of the video of these features, which has {whole} when padded")
        return self._decode(features)[:, :, :frames, :height, :width]

    @torch.no_grad()
    def tokenize(self, video: Tensor, labeling: hbq.Labeling, *, pad: bool = False) -> Tensor:
        """Float video [B, 3, T, H, W] in [-1, 1] -> int64 tokens [B, D, 1 + k, H/s, W/s]; the rest as in `encode`."""
        return hbq.tokens(self.encode(video, pad=pad), self.rounds, labeling)

    @torch.no_grad()
    def detokenize(self, tokens: Tensor, labeling: hbq.Labeling, *, size: Sequence[int] | None = None) -> Tensor:
        """int64 tokens [B, D, 1 + k, h, w] -> video; the rest as in `decode`."""
        return self.decode(hbq.dequantize(tokens, self.rounds, labeling), size=size)

    @torch.no_grad()
    def encode_stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """`encode` in memory that does not grow with the clip.

        Args:
            frames: float [B, 3, H, W] in [-1, 1], one by one.

        Yields:
            float32 features [B, z, H/s, W/s]: after the first frame, then after every `temporal_stride` more.

        Raises:
            UserError: frames of a wrong size, or frames left over at the end.
        """
        cache, chunk, count = CausalCache(), [], 0
        for frame in frames:
            chunk.append(frame)
            count += 1
            if len(chunk) == (1 if cache.is_first else self.temporal_stride):
                video = torch.stack(chunk, dim=2)
                self.check_video((*video.shape[:2], 1, *video.shape[3:]))
                yield self._encode(video, cache).squeeze(2)
                cache.is_first, chunk = False, []
        if chunk:
            self._check_frames(count)

    @torch.no_grad()
    def decode_stream(self, features: Iterable[Tensor]) -> Iterator[Tensor]:
        """`decode` in memory that does not grow with the clip.

        Args:
            features: [B, z, h, w], one latent after the other.

        Yields:
            frames [B, 3, h*s, w*s]: one of the first latent, `temporal_stride` of each other.
        """
        cache = CausalCache()
        for latent in features:
            yield from self._decode(latent.unsqueeze(2), cache).unbind(2)
            cache.is_first = False

    def _encode(self, video: Tensor, cache: "CausalCache | None" = None) -> Tensor:
        video = video.to(self.encoder.stem.weight.dtype)
        # Color, then column offset, then row offset.
        patches = rearrange(video, "b c t (h dh) (w dw) -> b (c dw dh) t h w", dh=PATCH, dw=PATCH)
        features = self.encoder(_channels_last(patches), cache)
        return features.float().tanh()  # float32: the bins of HBQ are finer than bfloat16 near ±1

    def _decode(self, features: Tensor, cache: "CausalCache | None" = None) -> Tensor:
        patches = self.decoder(_channels_last(features.to(self.decoder.stem.weight.dtype)), cache)
        return rearrange(patches, "b (c dw dh) t h w -> b c t (h dh) (w dw)", dh=PATCH, dw=PATCH)

    def check_video(self, shape: Sequence[int]) -> None:
        """Raises:
        UserError: a video [B, 3, T, H, W] of this shape cannot be encoded; the line names the nearest valid size.
        """
        if len(shape) != 5 or shape[1] != COLOURS:
            raise UserError(f"video must be [B, {COLOURS}, T, H, W] (an image is T = 1), got {list(shape)}")
        for name, size in (("height", shape[3]), ("width", shape[4])):
            if size % self.stride or size == 0:
                nearest = max(1, (size + self.stride // 2) // self.stride) * self.stride
                raise UserError(
                    f"{name} {size} is not a multiple of the tokenizer's stride {self.stride}; the nearest is {nearest}"
                )
        self._check_frames(shape[2])

    def _check_frames(self, frames: int) -> None:
        stride = self.temporal_stride
        if frames < 1 or (frames - 1) % stride:
            nearest = 1 + max(0, (frames - 1 + stride // 2) // stride) * stride
            raise UserError(
                f"{frames} frames are not 1 + {stride}*k, as this tokenizer needs; the nearest is {nearest}"
            )


def for_inference(tokenizer: HBQTokenizer, *, dtype: torch.dtype | None = None, compile: bool = False) -> HBQTokenizer:
    """Readies a tokenizer, in place, for nothing but encoding and decoding at speed; returns it.

    Args:
        dtype: of the weights from now on; None leaves them. In bfloat16 the work is about half of float32's, and a few
            bits of tokens near the edges of HBQ's bins flip. Faster than autocast, which casts all weights on every
            call and runs every norm on a float32 copy.
        compile: has encoder and decoder compiled when they first see a new shape, which takes minutes.
    """
    tokenizer.eval().requires_grad_(False).to(dtype=dtype)
    if compile:
        tokenizer.encoder.compile()
        tokenizer.decoder.compile()
    return tokenizer


class CausalCache:
    """What a clip that runs in chunks carries from one to the next: the last inputs of each temporal convolution.

    Attributes:
        is_first: whether the chunk that is running opens the clip.
    """

    def __init__(self):
        self.is_first = True
        self._past: dict[nn.Module, Tensor] = {}

    def extend(self, convolution: nn.Module, x: Tensor, context: int) -> Tensor:
        """`x` [B, C, T, H, W] behind the up to `context` inputs that `convolution` saw before it."""
        if convolution in self._past:
            x = torch.cat([self._past[convolution], x], dim=2)
        self._past[convolution] = x[:, :, -context:].clone()  # a view would keep the whole chunk
        return x


class Encoder(nn.Module):
    """Patches [B, 12, T, H, W] -> latents [B, z, T', H', W'] before tanh."""

    def __init__(
        self,
        latent_channels: int,
        dim: int,
        multipliers: Sequence[int],
        blocks: int,
        temporal: Sequence[bool],
        dropout: float,
    ):
        super().__init__()
        widths = [dim * multiplier for multiplier in (1, *multipliers)]
        self.stem = CausalConv3d(COLOURS * PATCH**2, widths[0], 3)
        self.stages = nn.ModuleList(
            EncoderStage(width, width_out, blocks, factors, dropout)
            for width, width_out, factors in zip(widths, widths[1:], [*map(_factors, temporal), None])
        )
        self.middle = Middle(widths[-1], dropout)
        self.head = Head(widths[-1], 2 * latent_channels)
        self.to_latent = CausalConv3d(2 * latent_channels, 2 * latent_channels, 1)

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        x = self.stem(x, cache)
        for stage in self.stages:
            x = stage(x, cache)
        x = self.head(self.middle(x, cache), cache)
        return self.to_latent(x).chunk(2, dim=1)[0]  # the other half was a variance, which HBQ has no use for


class Decoder(nn.Module):
    """Latents [B, z, T', H', W'] -> patches [B, 12, T, H, W]."""

    def __init__(
        self,
        latent_channels: int,
        dim: int,
        multipliers: Sequence[int],
        blocks: int,
        temporal: Sequence[bool],
        dropout: float,
    ):
        super().__init__()
        widths = [dim * multiplier for multiplier in (*multipliers, multipliers[-1])][::-1]
        self.from_latent = CausalConv3d(latent_channels, latent_channels, 1)
        self.stem = CausalConv3d(latent_channels, widths[0], 3)
        self.middle = Middle(widths[0], dropout)
        self.stages = nn.ModuleList(
            DecoderStage(width, width_out, blocks, factors, dropout)
            for width, width_out, factors in zip(widths, widths[1:], [*map(_factors, temporal[::-1]), None])
        )
        self.head = Head(widths[-1], COLOURS * PATCH**2)

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        x = self.middle(self.stem(self.from_latent(x), cache), cache)
        for stage in self.stages:
            x = stage(x, cache)
        return self.head(x, cache)


Factors = tuple[int, int]  # how much of time, and of height and width, a stage takes away or gives back


def _factors(temporal: bool) -> Factors:
    return (2 if temporal else 1, 2)


class EncoderStage(nn.Module):
    """Residual blocks, then a downsampling, around both a shortcut of averages.

    Args:
        factors: of the downsampling; None for the last stage, which has neither a downsampling nor, unless its input
            and output are equally wide, a shortcut.
    """

    def __init__(self, width: int, width_out: int, blocks: int, factors: Factors | None, dropout: float):
        super().__init__()
        if factors and (width * factors[0] * factors[1] ** 2) % width_out:
            raise UserError(
                f"multipliers: an encoder stage cannot go from {width} to {width_out} channels; the second must divide "
                f"{width * factors[0] * factors[1] ** 2}, the channels of its shortcut"
            )
        self.width_out, self.factors = width_out, factors
        self.has_shortcut = factors is not None or width == width_out
        self.blocks = nn.ModuleList(
            ResidualBlock(width if i == 0 else width_out, width_out, dropout) for i in range(blocks)
        )
        self.downsample = Downsample(width_out, temporal=factors[0] > 1) if factors else None

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        shortcut = x
        for block in self.blocks:
            x = block(x, cache)
        if self.downsample is not None and self.factors is not None:
            x = self.downsample(x, cache)
            shortcut = average_down(shortcut, self.width_out, self.factors)
        return x + shortcut if self.has_shortcut else x


class DecoderStage(nn.Module):
    """Residual blocks, then an upsampling, around both a shortcut of repetitions.

    Args:
        factors: of the upsampling; None for the last stage, which has neither an upsampling nor a shortcut.
    """

    def __init__(self, width: int, width_out: int, blocks: int, factors: Factors | None, dropout: float):
        super().__init__()
        if factors and (width_out * factors[0] * factors[1] ** 2) % width:
            raise UserError(
                f"multipliers: a decoder stage cannot go from {width} to {width_out} channels; the first must divide "
                f"{width_out * factors[0] * factors[1] ** 2}, the channels of its shortcut"
            )
        self.width_out, self.factors = width_out, factors
        self.blocks = nn.ModuleList(
            ResidualBlock(width if i == 0 else width_out, width_out, dropout) for i in range(blocks)
        )
        self.upsample = Upsample(width_out, temporal=factors[0] > 1) if factors else None

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        shortcut = x
        for block in self.blocks:
            x = block(x, cache)
        if self.upsample is None or self.factors is None:
            return x
        opens_clip = cache is None or cache.is_first
        return self.upsample(x, cache) + repeat_up(shortcut, self.width_out, self.factors, opens_clip=opens_clip)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution; norm, SiLU, dropout, convolution; plus the input (1x1x1 where widths differ)."""

    def __init__(self, width: int, width_out: int, dropout: float):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.conv1 = CausalConv3d(width, width_out, 3)
        self.norm2 = RMSNorm(width_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(width_out, width_out, 3)
        self.shortcut = CausalConv3d(width, width_out, 1) if width != width_out else nn.Identity()

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)), cache)
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))), cache)
        return self.shortcut(x) + hidden


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.block1 = ResidualBlock(width, width, dropout)
        self.attention = FrameAttention(width)
        self.block2 = ResidualBlock(width, width, dropout)

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        return self.block2(self.attention(self.block1(x, cache)), cache)


class FrameAttention(nn.Module):
    """Single-head attention among the positions of each frame, added to its input; starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        frames = _fold_frames(x)
        q, k, v = rearrange(self.qkv(self.norm(frames)), "n (three c) h w -> three n 1 (h w) c", three=3).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = rearrange(attended, "n 1 (h w) c -> n c h w", h=x.shape[3])
        return x + _unfold_frames(self.out(attended), x.shape[2])


class Head(nn.Module):
    """Norm, SiLU, convolution."""

    def __init__(self, width: int, width_out: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.conv = CausalConv3d(width, width_out, 3)

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        return self.conv(F.silu(self.norm(x)), cache)


class Downsample(nn.Module):
    """Halves height, width and, where `temporal`, all of time but the clip's first frame: 1 + 2k frames -> 1 + k."""

    def __init__(self, width: int, *, temporal: bool):
        super().__init__()
        self.space = nn.Conv2d(width, width, 3, stride=2)
        self.time = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        frames = F.pad(_fold_frames(x), (0, 1, 0, 1))
        x = _unfold_frames(self.space(frames), x.shape[2])
        if self.time is None:
            return x
        opens_clip = cache is None or cache.is_first
        seen = x if cache is None else cache.extend(self.time, x, 1)
        if seen.shape[2] == 1:
            return x
        later = self.time(seen)
        return torch.cat([x[:, :, :1], later], dim=2) if opens_clip else later


class Upsample(nn.Module):
    """Doubles height, width and, where `temporal`, all of time but the clip's first frame: 1 + k frames -> 1 + 2k."""

    def __init__(self, width: int, *, temporal: bool):
        super().__init__()
        self.time = CausalConv3d(width, 2 * width, (3, 1, 1)) if temporal else None
        self.space = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        if self.time is not None:
            x = self._double_time(self.time, x, cache)
        # A 3x3 convolution of pixels that come in equal 2x2 squares sees 2x2 pixels of the input at most: 4 products
        # instead of 9 for each output, and no enlarged map in memory.
        kernel = _doubling_kernel(self.space.weight)
        frames = F.conv_transpose2d(_fold_frames(x), kernel, self.space.bias, stride=2, padding=1)
        return _unfold_frames(frames, x.shape[2])

    @staticmethod
    def _double_time(time: "CausalConv3d", x: Tensor, cache: CausalCache | None) -> Tensor:
        opens_clip = cache is None or cache.is_first
        first, later = x.tensor_split([1 if opens_clip else 0], dim=2)
        if later.shape[2] == 0:
            return first
        # Causal over the later frames alone: the first is no part of their past.
        later = rearrange(time(later, cache), "b (two c) t h w -> b (t two) h w c", two=2)
        later = _channels_last(later.movedim(-1, 1))
        return torch.cat([first, later], dim=2) if opens_clip else later


class CausalConv3d(nn.Conv3d):
    """A convolution [B, C, T, H, W] -> [B, C', T, H, W] whose padding in time is all on the left.

    Args:
        kernel: size, odd in space; one number for all three axes.
    """

    def __init__(self, width: int, width_out: int, kernel: int | tuple[int, int, int]):
        time, height, width_of_kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        padding = (0, height // 2, width_of_kernel // 2)
        super().__init__(width, width_out, (time, height, width_of_kernel), padding=padding)

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        """`cache` gives what came before `x` in place of zeros, and keeps what the next chunk needs."""
        context = self.kernel_size[0] - 1
        seen = x if cache is None or context == 0 else cache.extend(self, x, context)
        if seen.shape[2] == 1:  # all else would be zeros: only the kernel's last slice counts, at a third of the work
            image = F.conv2d(x.squeeze(2), self.weight[:, :, -1], self.bias, padding=self.padding[1:])
            return image.unsqueeze(2)
        missing = context - (seen.shape[2] - x.shape[2])
        return super().forward(F.pad(seen, (0, 0, 0, 0, missing, 0)) if missing else seen)


class RMSNorm(nn.Module):
    """L2-normalizes [N, C, ...] over C, times sqrt(C) and a gain per channel; in float32, returned like the input.

    That is the root mean square's norm over the last axis, for which there are fused kernels; channels-last tensors
    reach them without a copy.
    """

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        eps = 1e-24 / len(self.gamma)  # of the mean square: an L2 norm of 1e-12
        channels_last = x.movedim(1, -1).to(self.gamma.dtype)  # under autocast: the kernels want one dtype
        return F.rms_norm(channels_last, self.gamma.shape, self.gamma, eps).movedim(-1, 1).to(x.dtype)


def average_down(x: Tensor, channels: int, factors: Factors) -> Tensor:
    """[B, C, T, H, W] -> [B, channels, ceil(T/ft), H/fs, W/fs]: space-time to depth, then means of adjacent channels.

    Time is padded with zeros on the left. `channels` must divide C * ft * fs^2.
    """
    time, space = factors
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0))
    x = rearrange(x, "b c (t dt) (h dh) (w dw) -> b (c dt dh dw) t h w", dt=time, dh=space, dw=space)
    return x.unflatten(1, (channels, -1)).mean(dim=2)


def repeat_up(x: Tensor, channels: int, factors: Factors, *, opens_clip: bool) -> Tensor:
    """[B, C, T, H, W] -> [B, channels, T*ft, H*fs, W*fs]: channels repeated, then depth to space-time.

    The chunk that opens a clip loses its first ft - 1 frames, so that one latent gives one frame. C must divide
    channels * ft * fs^2.
    """
    time, space = factors
    x = x.repeat_interleave(channels * time * space**2 // x.shape[1], dim=1)
    x = rearrange(x, "b (c dt dh dw) t h w -> b c (t dt) (h dh) (w dw)", dt=time, dh=space, dw=space)
    return x[:, :, time - 1 :] if opens_clip else x


def _doubling_kernel(weight: Tensor) -> Tensor:
    """[O, I, 3, 3] of a convolution after nearest doubling -> [I, O, 4, 4]: both as one transposed convolution."""
    mirror = torch.eye(3, dtype=weight.dtype, device=weight.device).flip(0)
    spread = F.pad(mirror, (0, 0, 0, 1)) + F.pad(mirror, (0, 0, 1, 0))  # [4, 3]: (a, b, c) -> (c, b + c, a + b, a)
    return (weight.transpose(0, 1).flatten(2) @ torch.kron(spread, spread).T).unflatten(2, (4, 4))


def _channels_last(x: Tensor) -> Tensor:
    """[B, C, T, H, W] with a position's channels side by side in memory, which all that follows keeps up."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def _fold_frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B*T, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def _unfold_frames(frames: Tensor, count: int) -> Tensor:
    """[B*T, C, H, W] -> [B, C, T, H, W], T = `count`."""
    return frames.unflatten(0, (-1, count)).transpose(1, 2)
