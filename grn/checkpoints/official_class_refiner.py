"""The authors' class-conditional checkpoints, e.g. `GRN_ind_B_ep599.pth`, in our names (golden/README)."""

from pathlib import Path

from torch import Tensor

from grn.checkpoints.mapping import Rule, rename
from grn.checkpoints.reading import read_untrusted
from grn.errors import UserError

PREFIX = "net."
EMAS = {"model_ema1": "0.9999", "model_ema2": "0.9996"}

CLASS_REFINER_RULES = [
    Rule(
        r"x_embedder\.proj1\.weight",
        "token_embedding.squeeze.weight",
        convert=lambda kernel: kernel[:, :, 0, 0],
        revert=lambda matrix: matrix[:, :, None, None],
    ),
    Rule(
        r"x_embedder\.proj2\.weight",
        "token_embedding.expand.weight",
        convert=lambda kernel: kernel[:, :, 0, 0],
        revert=lambda matrix: matrix[:, :, None, None],
    ),
    Rule(r"x_embedder\.proj2\.bias", "token_embedding.expand.bias"),
    Rule(r"t_embedder\.mlp\.0\.(weight|bias)", r"time_embedding.first.\1"),
    Rule(r"t_embedder\.mlp\.2\.(weight|bias)", r"time_embedding.second.\1"),
    Rule(r"y_embedder\.embedding_table\.weight", "label_embedding.weight"),
    Rule(
        "in_context_posemb",
        "context_position",
        convert=lambda table: table[0],
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


def load_official_class_refiner(path: str | Path) -> dict[str, dict]:
    """Reads an official file: {"model": state, "ema": {"0.9999": state, "0.9996": state}}, all in our names.

    Raises:
        UserError: missing, unreadable, or without the three state dicts; nothing in the file is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"model.weights: no file {path}")
    contents = read_untrusted(path, f"model.weights: {path} cannot be read as a checkpoint", mmap=True)
    missing = [key for key in ("model", *EMAS) if not isinstance(contents, dict) or key not in contents]
    if missing:
        raise UserError(
            f"model.weights: {path} is not an official class-conditional checkpoint (no {', '.join(missing)})"
        )

    def ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
        bare = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
        return rename(bare, CLASS_REFINER_RULES, source=str(path))

    return {
        "model": ours(contents["model"]),
        "ema": {decay: ours(contents[key]) for key, decay in EMAS.items()},
    }
