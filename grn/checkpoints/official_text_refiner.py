"""The authors' text refiners, e.g. `GRN_T2I_2B.pth`, in our names (golden/README): one flat state dict a file."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from grn.checkpoints.mapping import Rule, rename, rename_back
from grn.checkpoints.reading import is_state, read_official
from grn.errors import UserError
from grn.files import write_atomically

CHUNKS = 7  # of the blocks at size 2B

# Of names whose chunks of blocks have been joined: `blocks.{number}` for `block_chunks.{chunk}.module.{number in it}`.
TEXT_REFINER_RULES = [
    Rule(r"word_embed\.(weight|bias)", r"token_embedding.linear.\1"),
    Rule(r"pt_embedder\.mlp\.0\.(weight|bias)", r"time_embedding.first.\1"),
    Rule(r"pt_embedder\.mlp\.2\.(weight|bias)", r"time_embedding.second.\1"),
    Rule(r"text_proj\.(weight|bias)", r"text_projection.\1"),
    Rule(r"blocks\.(\d+)\.input_layernorm\.weight", r"blocks.\1.norm1.weight"),
    Rule(r"blocks\.(\d+)\.attn\.(q|k|v)_proj\.weight", r"blocks.\1.attention.\2.weight"),
    Rule(r"blocks\.(\d+)\.attn\.(q_norm|k_norm)\.weight", r"blocks.\1.attention.\2.weight"),
    Rule(r"blocks\.(\d+)\.attn\.o_proj\.weight", r"blocks.\1.attention.out.weight"),
    Rule(r"blocks\.(\d+)\.post_attention_layernorm\.weight", r"blocks.\1.norm2.weight"),
    Rule(r"blocks\.(\d+)\.mlp\.gate_proj\.weight", r"blocks.\1.mlp.gate.weight"),
    Rule(r"blocks\.(\d+)\.mlp\.up_proj\.weight", r"blocks.\1.mlp.value.weight"),
    Rule(r"blocks\.(\d+)\.mlp\.down_proj\.weight", r"blocks.\1.mlp.out.weight"),
    Rule(r"head\.norm\.weight", "head.norm.weight"),
    Rule(r"head\.proj\.(weight|bias)", r"head.out.\1"),
]
_IN_CHUNK = re.compile(r"block_chunks\.(\d{1,4})\.module\.(\d{1,4})\.(.+)", re.DOTALL)


def load_official_text_refiner(path: str | Path, *, key: str = "model.weights") -> dict[str, Tensor]:
    """The weights of an official file, on the CPU, by our names.

    Nothing in the file is executed. Whether they fit a network is for `grn.checkpoints.mapping.load_strict` to say.

    Args:
        key: the config key that errors name.

    Raises:
        UserError: missing, unreadable, or not one flat state dict of a text refiner.
    """
    path, state = read_official(path, key=key)
    if not state or not is_state(state):
        raise UserError(f"{key}: {path} is not an official text refiner, which is one flat state dict of weights")
    return our_state(state, source=str(path))


def our_state(state: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """An official state dict in our names, whatever the number of its chunks.

    Raises:
        UserError: a name that is not of an official text refiner.
    """
    blocks = defaultdict(set)
    for name in state:
        if match := _IN_CHUNK.fullmatch(name):
            blocks[int(match[1])].add(int(match[2]))
    order = {place: number for number, place in enumerate((c, m) for c in sorted(blocks) for m in sorted(blocks[c]))}

    def joined(name: str) -> str:
        match = _IN_CHUNK.fullmatch(name)
        return f"blocks.{order[int(match[1]), int(match[2])]}.{match[3]}" if match else name

    numbered = {joined(name): tensor for name, tensor in state.items()}
    if len(numbered) < len(state):
        raise UserError(f"{source} is not an official text refiner: two of its names mean the same")
    return rename(numbered, TEXT_REFINER_RULES, source=source)


def official_state(state: Mapping[str, Tensor], *, chunks: int = CHUNKS) -> dict[str, Tensor]:
    """A text refiner's state dict in the authors' names, its blocks in `chunks` of one size.

    Raises:
        UserError: the blocks cannot be shared out evenly.
    """
    theirs = rename_back(dict(state), TEXT_REFINER_RULES, source="refiner")
    depth = len({name.split(".")[1] for name in theirs if name.startswith("blocks.")})
    if depth % chunks:
        raise UserError(f"a refiner of model.depth={depth} has no official names in {chunks} chunks of blocks")

    def parted(match: re.Match) -> str:
        chunk, number = divmod(int(match[1]), depth // chunks)
        return f"block_chunks.{chunk}.module.{number}."

    return {re.sub(r"^blocks\.(\d+)\.", parted, name): tensor for name, tensor in theirs.items()}


def save_official_text_refiner(state: Mapping[str, Tensor], path: str | Path, *, chunks: int = CHUNKS) -> Path:
    """Writes a text refiner's state dict as a file of the authors' kind, atomically; returns its path."""
    contents = {name: tensor.detach().cpu() for name, tensor in official_state(state, chunks=chunks).items()}
    return write_atomically(Path(path).expanduser(), lambda temporary: torch.save(contents, temporary))
