import pytest
import torch

from grn.networks import text_encoder
from grn.networks.text_encoder import TextEncoder
from grn.runtime.errors import UserError
from grn.weights.mapping import rename, rename_back
from grn.weights.official_umt5 import UMT5_RULES, load_official_umt5


@pytest.fixture
def state(golden):
    """As the authors' file has it."""
    return {k.removeprefix("state."): v for k, v in golden("umt5").items() if k.startswith("state.")}


@pytest.fixture
def path(state, tmp_path):
    torch.save(state, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    return tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"


def test_golden(path, golden):
    tensors = golden("umt5")
    encoder = TextEncoder(text_encoder._official(str(path)).eval(), range(64), max_length=9)
    hidden = encoder.encode(tensors["ids"], tensors["mask"])
    here = tensors["mask"].bool()
    torch.testing.assert_close(hidden[here], tensors["hidden"][here], atol=1e-5, rtol=0)


def test_sizes_are_read_off_the_weights(path, golden_meta):
    sizes = load_official_umt5(path)[1]
    meta = golden_meta["umt5"]
    assert sizes == {
        "vocab_size": meta["vocab"],
        "relative_attention_num_buckets": meta["num_buckets"],
        **{name: meta[name] for name in ("d_model", "d_kv", "d_ff", "num_heads", "num_layers")},
    }


def test_names_there_and_back(state):
    again = rename_back(rename(state, UMT5_RULES), UMT5_RULES)
    assert again.keys() == state.keys()
    assert all(again[name] is state[name] for name in state)


def test_hostile_and_foreign_files_are_refused(state, path, tmp_path):
    contents = {
        "unknown": (state | {"surprise": torch.zeros(1)}, "'surprise' is not of a known official checkpoint"),
        "nested": ({"model": state}, "is not the official umT5 encoder"),
        "empty": ({}, "is not the official umT5 encoder"),
        "flat": (state | {"blocks.0.attn.q.weight": torch.zeros(3)}, "is not the official umT5 encoder"),
        "headless": (state | {"blocks.0.pos_embedding.embedding.weight": torch.zeros(32, 0)}, "is not the official"),
        "gap": (
            {k.replace("blocks.1.", "blocks.1000000000."): v for k, v in state.items()},
            "is of another size than the model: encoder.block.1.layer.0.* missing",
        ),
    }
    for name, (content, words) in contents.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=words) as error:
            text_encoder._official(str(tmp_path / f"{name}.pth"))
        assert "\n" not in str(error.value)
        assert str(error.value).startswith("text_encoder.weights: ") or name == "unknown"
    path.write_bytes(b"noise")
    with pytest.raises(UserError, match=r"text_encoder\.weights: .* cannot be read as a checkpoint"):
        load_official_umt5(path)
    with pytest.raises(UserError, match=r"text_encoder\.weights: no file /nowhere"):
        load_official_umt5("/nowhere")
