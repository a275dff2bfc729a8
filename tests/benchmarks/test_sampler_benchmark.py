import json

import pytest
from hydra import compose, initialize_config_dir

from grn.benchmarks.bench import bench
from grn.benchmarks.sampler import NAMES
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError

SMALL = (
    "benchmark=sampler",
    "model.depth=1",
    "model.width=16",
    "model.heads=2",
    "model.context_start=0",
    "device=cpu",
    "repeats=1",
    "benchmark.num=12",
    "benchmark.batch_size=5",
    "benchmark.steps=8",
    "benchmark.min_steps=6",
    "benchmark.mean_steps=7",
)


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("bench", list(overrides))


def test_report_is_complete(tmp_path, capsys):
    bench(composed(*SMALL, f"out={tmp_path}"))
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["benchmark"] == "sampler"
    assert report["sizes"]["num"] == 12
    rows = report["rows"]
    names = list(NAMES)
    assert [row["variant"] for row in rows] == names * 2
    assert [row["dtype"] for row in rows] == ["float32"] * 2 + ["bfloat16"] * 2
    for fixed in (rows[0], rows[2]):
        assert (fixed["ratio"], fixed["ratio_per_step"], fixed["steps_mean"]) == (1, 1, 8)
    for row in rows[1:2]:
        assert row["steps_mean"] == pytest.approx(7, abs=0.3)
        assert 6 <= row["steps_min"] < row["steps_max"] <= 8
        assert row["ratio_per_step"] == pytest.approx(row["ratio"] * 8 / row["steps_mean"])
        assert row["within_bar"] == (row["ratio_per_step"] <= report["bar"])
    for row in rows:
        assert row["images_per_second"] == pytest.approx(12 / row["seconds"])
        assert row["equal_tokens"] > (0.99 if row["dtype"] == "float32" else 0.3)
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*names, "equal", "1.15"])


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["benchmark.num=-1"], r"benchmark\.num=-1"),
        (["benchmark.mean_steps=5"], r"benchmark\.mean_steps=5"),
        (["benchmark.ckpt=/nowhere"], r"benchmark\.ckpt: no such checkpoint"),
        (["model=tokenizer_small"], "model=class_refiner"),
    ],
)
def test_mistakes(overrides, complaint, tmp_path):
    overrides = [*(o for o in SMALL if "tokenizer" not in overrides[0] or not o.startswith("model")), *overrides]
    with pytest.raises(UserError, match=complaint):
        bench(composed(*overrides, f"out={tmp_path}"))
