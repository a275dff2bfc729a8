"""The authors' text refiners, e.g. `GRN_T2I_2B_FSA_251600.pth`, in our names.

A file is one flat state dict, or of training, {"trainer": {"gpt_fsdp": weights, "gpt_ema_fsdp": their average}, ...}.
Files of the first release and those since June 2026 have the same names and shapes, but another attention
(`TextRefiner`): which, only a file's name tells.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from grn.networks.text_refiner import Scheme
from grn.runtime.errors import UserError
from grn.runtime.files import write_atomically
from grn.weights.mapping import Rule, rename, rename_back
from grn.weights.reading import is_state, read_official

log = logging.getLogger(__name__)

FIRST_RELEASE = ("GRN_T2I_2B", "GRN_T2V_2B")  # the names of its files, of one-way attention
TRAINED, AVERAGED = ("gpt_fsdp", "gpt_ema_fsdp"), "0.999"  # in a file of training; the decay of the second
WIDTH_8B = 4096  # no weights of one-way attention are known to be as wide
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
    """The weights of an official file, on the CPU, by our names; of a file of training, those that were trained.

    Nothing in the file is executed. Whether they fit a network is for `grn.weights.mapping.load_strict` to say.

    Args:
        key: the config key that errors name.

    Raises:
        UserError: missing, unreadable, or no official text refiner.
    """
    return load_official_training(path, key=key)[0]


def load_official_training(
    path: str | Path, *, key: str = "model.weights"
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """(Weights, their averages by decay, if any) of an official file; arguments as of `load_official_text_refiner`."""
    path, contents = read_official(path, key=key)
    trainer = contents.get("trainer") if isinstance(contents, dict) else None
    found = [contents] if trainer is None else [trainer.get(name) for name in TRAINED if name in trainer]
    if (
        len(found) == 0
        or not all(state and is_state(state) for state in found)
        or (trainer and TRAINED[0] not in trainer)
    ):
        raise UserError(f"{key}: {path} is not an official text refiner, which is one flat state dict of weights")
    weights, *average = (our_state(state, source=str(path)) for state in found)
    return weights, dict(zip([AVERAGED], average))


def check_attention(state: Mapping[str, Tensor], attention: Scheme, path: str | Path, *, key: str) -> None:
    """Whether weights, by our names, go with a network's attention, as far as a file tells; else a warning says so.

    Args:
        path: the file's.
        key: the config key that gave it.

    Raises:
        UserError: they do not.
    """
    name = Path(path).stem
    if "FSA" in name or len(state["head.norm.weight"]) >= WIDTH_8B:
        trained = "full"
    elif name in FIRST_RELEASE:
        trained = "one_way"
    else:
        log.warning("%s=%s does not tell its attention: taken as model.attention=%s", key, path, attention)
        return
    if trained != attention:
        raise UserError(f"{key}={path} has {trained} attention, the model {attention}: set model.attention={trained}")


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
