import json

import pytest
import torch
from test_c2i_benchmark import composed

from grn.benchmarks import gpu
from grn.benchmarks.bench import bench
from grn.runtime.errors import UserError

REFINER = {"depth": 2, "width": 32, "heads": 2, "bottleneck": 8, "context_start": 1, "context_tokens": 2, "size": 4}
REFINER |= {"num_labels": 10}
TEXT = {"depth": 2, "width": 64, "heads": 2, "mlp_ratio": 6, "text_width": 8, "channels": 4}
TOKENIZER = {"dim": 8, "decoder_dim": 8, "multipliers": "[1,2]", "temporal": "[false]", "blocks_per_stage": 1}
SIZES = {"batch_size": 4, "sample_batch_size": 4, "steps": 12, "mean_steps": 9, "image_size": 16, "image_batch_size": 2}
SIZES |= {"frames": 5, "max_tokens": 50, "pixels": 16, "text_tokens": 3, "text_steps": 2, "compile": "false"}
SIZES |= {"num_workers": 0}
NETWORKS = {
    "B": REFINER,
    "L": REFINER,
    "text": TEXT,
    "tokenizer": TOKENIZER,
    "clip": TOKENIZER | {"temporal": "[true]"},
}
SMALL = ["benchmark=gpu", "device=cpu", "repeats=1"]
SMALL += [f"benchmark.{name}={value}" for name, value in SIZES.items()]
SMALL += [f"benchmark.{part}.{name}={value}" for part, values in NETWORKS.items() for name, value in values.items()]


@pytest.mark.full
def test_every_part_is_measured_and_told_as_it_ends(tmp_path, capsys):
    bench(composed(*SMALL, f"out={tmp_path}"))
    report = json.loads((tmp_path / "bench.json").read_text())
    parts, printed = report["parts"], capsys.readouterr().out
    assert not [part for part, row in parts.items() if "error" in row], parts
    told = [json.loads(line) for line in printed.splitlines() if line.startswith('{"')]
    assert [name for row in told for name in row] == list(parts)
    assert len(parts) == 12
    for name, row in parts.items():
        assert row["took_seconds"] > 0
        if name != "machine":
            assert row["per_second"] > 0, name
    for name in ("train_B", "train_L", "sample_B", "sample_L", "encode", "decode", "text_train"):
        assert parts[name]["share_of_matmul"] > 0, name
        assert parts[name]["bytes"] > 0, name
    assert all(name in printed for name in parts)
    assert "2600" in printed


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(gpu, "_train", broken)
    bench(composed(*SMALL, "benchmark.parts=[train_B,machine]", f"out={tmp_path}"))
    parts = json.loads((tmp_path / "bench.json").read_text())["parts"]
    assert parts["train_B"]["error"] == "OutOfMemoryError: no memory"
    assert parts["machine"]["copy_bytes_per_second"] > 0
    assert "no memory" in capsys.readouterr().out
    bench(composed(*SMALL, "benchmark.parts=[machine]", "benchmark.seconds=-1", f"out={tmp_path}/late"))
    late = json.loads((tmp_path / "late" / "bench.json").read_text())["parts"]["machine"]
    assert late["error"] == "not begun within benchmark.seconds=-1"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("benchmark.parts=[train_X]", r"benchmark\.parts=\['train_X'\]: choose among machine, train_B"),
        ("benchmark.mean_steps=12", r"benchmark\.mean_steps=12: between 1 and benchmark\.steps=12"),
    ],
)
def test_mistakes_name_their_keys(override, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        bench(composed(*SMALL, override, f"out={tmp_path}"))
