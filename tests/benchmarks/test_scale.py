import json

import pytest
from test_c2i_benchmark import composed

from grn.benchmarks.bench import bench
from grn.runtime.errors import UserError

SMALL = ("benchmark=scale", "model=class_refiner", "model.depth=3", "benchmark.ranks=8", "benchmark.batch_size=2")


@pytest.mark.full
def test_every_byte_of_states_is_on_some_rank(tmp_path, capsys):
    """Halves of eight ranks hold a copy each; the bytes of gathering and reducing are those of the weights."""
    bench(composed(*SMALL, "benchmark.shard_size=4", "benchmark.averages=1", f"out={tmp_path}"))
    report = json.loads((tmp_path / "bench.json").read_text())
    first, last = report["ranks"]
    assert (first["rank"], last["rank"]) == (0, 7)
    whole = 4 * report["parameters"]
    for row in (first, last):
        parts = row["bytes"]
        for part, times in (("weights", 1), ("gradients", 1), ("averages", 1), ("optimizer", 2)):
            assert parts[part] == pytest.approx(times * whole / 4, rel=0.02), part
        assert sum(parts.values()) - parts["gradients"] <= row["peak_bytes"] <= sum(parts.values())
        received = row["received_bytes"]
        # Reduced in float32 within a copy, and the shards between both; gathered in bfloat16 twice.
        assert received["reduce_scatter_base"] == pytest.approx(whole * 3 / 4, rel=0.02)
        assert received["allreduce"] == pytest.approx(whole / 4, rel=0.02)
        assert received["allgather_base"] == pytest.approx(2 * whole / 2 * 3 / 4, rel=0.15)  # the head's in float32
    assert report["checkpoint"]["bytes"] == 4 * whole
    assert "8 ranks in copies of 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("benchmark.shard_size=3", "benchmark.shard_size=3 does not divide benchmark.ranks=8"),
        ("benchmark.ranks=0", "benchmark.ranks=0 must be"),
        ("benchmark.loss_chunk=0", "benchmark.loss_chunk=0 must be"),
        ("benchmark.averages=-1", "benchmark.averages=-1 must be"),
        ("model=tokenizer", "is for refiners"),
        ("benchmark.activations=some", "benchmark.activations"),
    ],
)
def test_mistakes_name_their_keys(override, complaint, tmp_path):
    asked = SMALL if override != "model=tokenizer" else SMALL[:1]
    with pytest.raises(UserError, match=complaint):
        bench(composed(*asked, override, f"out={tmp_path}"))
