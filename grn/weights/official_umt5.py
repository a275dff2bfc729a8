"""The authors' text encoder file (`models_t5_umt5-xxl-enc-bf16.pth`) with transformers' parameter names."""

from pathlib import Path
from typing import Any

from torch import Tensor

from grn.runtime.errors import UserError
from grn.weights.mapping import Rule, rename
from grn.weights.reading import is_state, read_official

_ATTENTION, _MLP = r"encoder.block.\1.layer.0", r"encoder.block.\1.layer.1"
UMT5_RULES = [
    Rule(r"token_embedding\.weight", "shared.weight"),
    Rule(r"blocks\.(\d+)\.norm1\.weight", rf"{_ATTENTION}.layer_norm.weight"),
    Rule(r"blocks\.(\d+)\.attn\.(q|k|v|o)\.weight", rf"{_ATTENTION}.SelfAttention.\2.weight"),
    Rule(
        r"blocks\.(\d+)\.pos_embedding\.embedding\.weight",
        rf"{_ATTENTION}.SelfAttention.relative_attention_bias.weight",
    ),
    Rule(r"blocks\.(\d+)\.norm2\.weight", rf"{_MLP}.layer_norm.weight"),
    Rule(r"blocks\.(\d+)\.ffn\.gate\.0\.weight", rf"{_MLP}.DenseReluDense.wi_0.weight"),
    Rule(r"blocks\.(\d+)\.ffn\.fc1\.weight", rf"{_MLP}.DenseReluDense.wi_1.weight"),
    Rule(r"blocks\.(\d+)\.ffn\.fc2\.weight", rf"{_MLP}.DenseReluDense.wo.weight"),
    Rule(r"norm\.weight", "encoder.final_layer_norm.weight"),
]
_SIZES = ("token_embedding", "blocks.0.attn.q", "blocks.0.ffn.fc1", "blocks.0.pos_embedding.embedding")


def load_official_umt5(
    path: str | Path, *, key: str = "text_encoder.weights"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(State dict of a transformers `UMT5EncoderModel`, on the CPU; the sizes that its `UMT5Config` needs).

    Nothing in the file is executed. Whether all weights fit the sizes is for `load_strict` to say.

    Args:
        key: the config key that errors name.

    Raises:
        UserError: missing, unreadable, or not one flat state dict of a umT5 encoder.
    """
    path, state = read_official(path, key=key)
    foreign = UserError(f"{key}: {path} is not the official umT5 encoder, which is one flat state dict of weights")
    if not is_state(state):
        raise foreign
    shapes: list[Any] = [state[f"{name}.weight"].shape if f"{name}.weight" in state else () for name in _SIZES]
    if not all(len(shape) == 2 and min(shape) > 0 for shape in shapes):
        raise foreign
    (vocabulary, width), (inner, _), (hidden, _), (buckets, heads) = shapes
    sizes = {"vocab_size": vocabulary, "d_model": width, "d_kv": inner // heads, "d_ff": hidden, "num_heads": heads}
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    sizes |= {"num_layers": len(blocks), "relative_attention_num_buckets": buckets}
    return transformers_state(state, source=str(path)), sizes


def transformers_state(state: dict[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The official names -> those of `UMT5EncoderModel`, which names its one table of tokens twice."""
    renamed = rename(state, UMT5_RULES, source=source)
    return renamed | {"encoder.embed_tokens.weight": renamed["shared.weight"]}
