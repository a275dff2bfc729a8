"""Text encoders: captions to features of their tokens, by the T5 encoders of transformers.

transformers takes seconds to import and is imported when an encoder is made.
"""

import functools
import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from grn.runtime.errors import UserError, check_count
from grn.weights.from_transformers import load_pretrained
from grn.weights.mapping import load_strict
from grn.weights.official_umt5 import load_official_umt5
from grn.weights.pretrained import Pretrained, brief, local_file

CHARACTERS = 64  # of a caption, for every token that is kept: the rest of an endless one is not even tokenized
# Not float16: T5's MLPs leave its range, and transformers keeps a part of them in float32 in it.
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Captions * tokens^2 of a call, padding included: T5 holds about 4 bytes of each, by heads: 0.5 GB of umT5-XXL's 64.
CALL = 2**21
SHORT = 64  # tokens: of shorter captions, other activations are what fills the memory


class TextEncoder(nn.Module):
    """A T5 encoder and its tokenizer.

    Args:
        encoder: of transformers: (input_ids, attention_mask) -> last_hidden_state.
        tokenizer: of transformers.
        max_length: tokens a caption, the end token included; longer captions are cut.
        clean_captions: `clean` captions first.
    """

    def __init__(self, encoder: Any, tokenizer: Any, *, max_length: int, clean_captions: bool = False):
        super().__init__()
        check_count("text_encoder.max_length", max_length)
        if not isinstance(clean_captions, bool):
            raise UserError(f"text_encoder.clean_captions={clean_captions} must be true or false")
        if len(tokenizer) > encoder.config.vocab_size:
            raise UserError(
                f"text_encoder.tokenizer has {len(tokenizer)} tokens, the encoder knows {encoder.config.vocab_size}: "
                "give the encoder's own"
            )
        self.encoder, self.tokenizer, self.max_length = encoder, tokenizer, max_length
        self.clean_captions = clean_captions

    @property
    def width(self) -> int:
        """Of the features: the refiner's `text_width`."""
        return self.encoder.config.d_model

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Features [sum of lengths, width], caption after caption, and the length of each in tokens, 1..max_length.

        Any captions will do: empty ones, too long ones, lone surrogates (half a character, which UTF-8 cannot say).
        """
        ids = self.tokenize(captions)
        lengths = [len(caption) for caption in ids]
        features: dict[int, Tensor] = {}
        for rows in _calls(lengths):
            for row, own in zip(rows, self._encode_padded([ids[row] for row in rows])):
                features[row] = own
        return torch.cat([features[row] for row in range(len(ids))]), lengths

    def _encode_padded(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """The features [length, width] of each caption, of one call of the encoder."""
        lengths = [len(caption) for caption in ids]
        device = next(self.encoder.parameters()).device
        padded = pad_sequence([torch.tensor(caption) for caption in ids], batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
        filled = mask.flatten().nonzero().squeeze(1).to(device)  # told here: nobody waits for the device to count
        return self.encode(padded.to(device), mask.to(device)).flatten(0, 1)[filled].split(lengths)

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """The tokens of each caption, at least one and at most max_length."""
        return self.tokenization(captions)

    @property
    def tokenization(self) -> "Tokenization":
        """`tokenize` without the encoder: for processes that only count."""
        return Tokenization(self.tokenizer, self.max_length, self.clean_captions)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """int64 [B, L], and where they are tokens rather than padding -> features [B, L, width], any at padding."""
        return self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state


def _calls(lengths: Sequence[int]) -> list[list[int]]:
    """Captions of like lengths together, so that a long one pads few others: which ones each call encodes."""
    calls: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not calls or (len(calls[-1]) + 1) * longest**2 > CALL:
            calls.append([])
            longest = max(lengths[row], SHORT)
        calls[-1].append(row)
    return calls


@dataclass(frozen=True)
class Tokenization:
    """Captions -> the tokens of each, at least one and at most `max_length`."""

    tokenizer: Any
    max_length: int
    clean_captions: bool

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        cut = [caption[: CHARACTERS * self.max_length] for caption in captions]
        cleaned = [clean(caption) if self.clean_captions else caption for caption in cut]
        texts = [caption.encode("utf-8", "replace").decode() for caption in cleaned]
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        return [list(caption) or [self.tokenizer.pad_token_id or 0] for caption in ids]

    def is_cut(self, caption: str) -> bool:
        """Whether a caption has more tokens than are taken."""
        if len(self([caption])[0]) < self.max_length:
            return False
        longer = replace(self, max_length=self.max_length + 1)
        return len(caption) > CHARACTERS * self.max_length or len(longer([caption])[0]) > self.max_length

    def used(self, caption: str) -> str:
        """What is taken of a caption, as its tokens say it."""
        return self.tokenizer.decode(self([caption])[0], skip_special_tokens=True)


def clean(caption: str) -> str:
    """As users of umT5 clean captions: ftfy mends them (broken encodings, curly quotes, full-width letters), HTML
    entities become characters, also those that were escaped twice, and each run of white space becomes one space."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())


class ByteT5(Pretrained, TextEncoder):
    """A small T5 encoder on the bytes of a caption, without files or downloads: for training along with the refiner.

    `from_pretrained` loads a trained one.

    Args:
        width, depth, heads: of the encoder.
        hidden: width of its gated MLP.
        dropout: in training.
        max_length: bytes a caption, and one more for its end.
        clean_captions: as `TextEncoder` has it.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        dropout: float = 0.0,
        max_length: int = 128,
        clean_captions: bool = False,
    ):
        from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

        if width % heads:
            raise UserError(f"text_encoder.width={width} must be a multiple of text_encoder.heads={heads}")
        tokenizer = ByT5Tokenizer(extra_ids=0)
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // heads,
            d_ff=hidden,
            num_layers=depth,
            num_heads=heads,
            dropout_rate=dropout,
            feed_forward_proj="gated-gelu",
        )
        # The stack alone: T5EncoderModel has the embedding a second time, which sharding would take for another one.
        encoder = T5EncoderModel(config).encoder
        super().__init__(encoder, tokenizer, max_length=max_length, clean_captions=clean_captions)

    def initializers(self, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Callable]]:
        """Each parameter once, with what fills it or another tensor of its shape: T5's scheme, by fan-in."""
        config = self.encoder.config
        wide, inner = config.d_model**-0.5, config.d_ff**-0.5
        queries, attended = wide * config.d_kv**-0.5, (config.num_heads * config.d_kv) ** -0.5
        stds = {"q": queries, "o": attended, "wo": inner, "embed_tokens": 1.0}
        for name, parameter in self.encoder.named_parameters():
            if parameter.ndim == 1:
                yield parameter, nn.init.ones_
            else:
                std = stds.get(name.split(".")[-2], wide)
                yield parameter, functools.partial(nn.init.normal_, std=std, generator=generator)


class PretrainedT5(TextEncoder):
    """A frozen T5, mT5 or umT5 encoder, always in evaluation mode; no code of a checkpoint is ever executed.

    Args:
        path: a folder as transformers writes it, or a repository on the Hugging Face Hub, e.g. `google/umt5-xxl`.
        weights: the authors' single file of umT5-XXL (`models_t5_umt5-xxl-enc-bf16.pth`), instead of those in `path`,
            which then has only the tokenizer.
        tokenizer: a folder or repository as `path`; None: `path`.
        dtype: of the weights: bfloat16 or float32.
        max_length: tokens a caption.
        clean_captions: as `TextEncoder` has it.

    Raises:
        UserError: not there, not to be had, or of something else.
    """

    def __init__(
        self,
        *,
        path: str,
        weights: str | None = None,
        tokenizer: str | None = None,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        max_length: int = 512,
        clean_captions: bool = False,
    ):
        from transformers import AutoTokenizer

        if dtype not in DTYPES:
            raise UserError(f"text_encoder.dtype={dtype}: choose among {', '.join(DTYPES)}")
        key, source = ("path", path) if tokenizer is None else ("tokenizer", tokenizer)
        found = _load(f"text_encoder.{key}", source, AutoTokenizer.from_pretrained)
        if found.unk_token_id in found("a")["input_ids"]:  # where files are missing, transformers makes an empty one
            raise UserError(f"text_encoder.{key}: {source} has no tokenizer; give one as text_encoder.tokenizer")
        encoder = _official(weights) if weights is not None else _pretrained(path, DTYPES[dtype])
        super().__init__(encoder.to(DTYPES[dtype]), found, max_length=max_length, clean_captions=clean_captions)
        # Arguments that make this encoder again, also in another folder.
        places = {"path": path, "weights": weights, "tokenizer": tokenizer}
        self.reference = {name: _absolute(place) for name, place in places.items()}
        self.reference |= {"dtype": dtype, "max_length": max_length, "clean_captions": clean_captions}
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PretrainedT5":
        return super().train(False)

    @torch.no_grad()
    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        return super().encode(ids, mask)


def _absolute(place: str | None) -> str | None:
    """Of what is here; ids on the Hub stay as they are."""
    if place is None or not Path(place).expanduser().exists():
        return place
    return str(Path(place).expanduser().resolve())


def _pretrained(path: str, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, MT5EncoderModel, T5EncoderModel, UMT5EncoderModel

    key = "text_encoder.path"
    kinds = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}
    kind = _load(key, path, AutoConfig.from_pretrained).model_type
    if kind not in kinds:
        raise UserError(f"{key}: {path} is a {brief(kind)}; text encoders here are {', '.join(kinds)}")
    encoder, report = _load(key, path, kinds[kind].from_pretrained, dtype=dtype, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise UserError(f"{key}: {path} lacks the weights {missing[0]} ({len(missing)} in all); download it again")
    return encoder


def _official(path: str) -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    state, sizes = load_official_umt5(local_file(path))
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu"))
    load_strict(encoder, state, source=f"text_encoder.weights: {path}", remedy="download it again")
    encoder.tie_weights()
    return encoder


def _load(key: str, path: str, load: Callable[..., Any], **options: Any) -> Any:
    return load_pretrained(key, path, load, example="google/umt5-xxl", **options)
