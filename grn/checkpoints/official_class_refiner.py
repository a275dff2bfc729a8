"""The authors' class-conditional checkpoints, e.g. `GRN_ind_B_ep599.pth`, in our names (golden/README)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grn.runtime.errors import UserError
from grn.runtime.files import write_atomically
from grn.weights.mapping import Rule, rename, rename_back
from grn.weights.reading import is_state, read_official

PREFIX = "net."
SAMPLED, AVERAGED_FASTER = "0.9999", "0.9996"  # decays; the authors sample from the first
EMAS = {"model_ema1": SAMPLED, "model_ema2": AVERAGED_FASTER}


def _matrix(kernel: Tensor) -> Tensor:
    """[O, I, 1, 1] -> [O, I]; a view of whatever a hostile file has, whose shape is checked afterwards."""
    return kernel.squeeze(tuple(range(2, kernel.ndim)))


CLASS_REFINER_RULES = [
    Rule(
        r"x_embedder\.proj1\.weight",
        "token_embedding.squeeze.weight",
        convert=_matrix,
        revert=lambda matrix: matrix[:, :, None, None],
    ),
    Rule(
        r"x_embedder\.proj2\.weight",
        "token_embedding.expand.weight",
        convert=_matrix,
        revert=lambda matrix: matrix[:, :, None, None],
    ),
    Rule(r"x_embedder\.proj2\.bias", "token_embedding.expand.bias"),
    Rule(r"t_embedder\.mlp\.0\.(weight|bias)", r"time_embedding.first.\1"),
    Rule(r"t_embedder\.mlp\.2\.(weight|bias)", r"time_embedding.second.\1"),
    Rule(r"y_embedder\.embedding_table\.weight", "label_embedding.weight"),
    Rule(
        "in_context_posemb",
        "context_position",
        convert=lambda table: table.squeeze(0),
        revert=lambda table: table[None],
    ),
    Rule(r"blocks\.(\d+)\.attn\.(qkv|q_norm|k_norm)\.(weight|bias)", r"blocks.\1.attention.\2.\3"),
    Rule(r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"blocks.\1.attention.out.\2"),
    Rule(r"blocks\.(\d+)\.mlp\.w12\.(weight|bias)", r"blocks.\1.mlp.gate_and_value.\2"),
    Rule(r"blocks\.(\d+)\.mlp\.w3\.(weight|bias)", r"blocks.\1.mlp.out.\2"),
    Rule(r"blocks\.(\d+)\.(norm1|norm2)\.weight", r"blocks.\1.\2.weight"),
    Rule(r"blocks\.(\d+)\.adaLN_modulation\.1\.(weight|bias)", r"blocks.\1.modulation.\2"),
    Rule(r"final_layer\.norm_final\.weight", "head.norm.weight"),
    Rule(r"final_layer\.linear\.(weight|bias)", r"head.out.\1"),
    Rule(r"final_layer\.adaLN_modulation\.1\.(weight|bias)", r"head.modulation.\1"),
    # Fixed tables, which we compute.
    Rule("pos_embed", None),
    Rule(r"feat_rope(_incontext)?\.freqs_(cos|sin)", None),
]


def is_official_class_refiner(contents: Any) -> bool:
    """Whether that, out of a file, has the parts of an official checkpoint."""
    return isinstance(contents, dict) and {"model", *EMAS} <= contents.keys()


def load_official_class_refiner(path: str | Path, *, key: str = "model.weights") -> dict[str, dict]:
    """Reads an official file: {"model": state, "ema": {"0.9999": state, "0.9996": state}}, all in our names.

    Args:
        key: the config key that errors name.

    Raises:
        UserError: missing, unreadable, or without the three state dicts; nothing in the file is executed.
    """
    path, contents = read_official(path, key=key)
    if not is_official_class_refiner(contents):
        parts = ", ".join(("model", *EMAS))
        raise UserError(f"{key}: {path} is not an official class-conditional checkpoint, which has {parts}")

    def ours(state: Any) -> dict[str, Tensor]:
        if not is_state(state):
            raise UserError(f"{key}: {path} is not an official class-conditional checkpoint: not all is named weights")
        bare = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
        return rename(bare, CLASS_REFINER_RULES, source=str(path))

    return {
        "model": ours(contents["model"]),
        "ema": {decay: ours(contents[part]) for part, decay in EMAS.items()},
    }


def official_state(state: Mapping[str, Tensor], position: Tensor) -> dict[str, Tensor]:
    """A refiner's state dict in the authors' names and shapes; `position` is its table, which their files hold, too."""
    theirs = rename_back(dict(state), CLASS_REFINER_RULES, source="refiner")
    return {PREFIX + name: tensor for name, tensor in {"pos_embed": position[None], **theirs}.items()}


def save_official_class_refiner(
    model: Mapping[str, Tensor], averages: Mapping[str, Mapping[str, Tensor]], position: Tensor, path: str | Path
) -> Path:
    """Writes a file of the authors' kind, atomically; returns its path.

    Args:
        model: the weights as trained, by our names.
        averages: of the decays in `EMAS`.
        position: float32 [size * size, width], the network's table.
    """
    states = {"model": model} | {part: averages[decay] for part, decay in EMAS.items()}
    contents = {
        part: {name: tensor.detach().cpu() for name, tensor in official_state(state, position).items()}
        for part, state in states.items()
    }
    return write_atomically(Path(path).expanduser(), lambda temporary: torch.save(contents, temporary))
