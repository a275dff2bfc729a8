import json

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from grn.benchmarks.bench import bench
from grn.benchmarks.c2i import VARIANTS, passes
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError

SMALL = (
    "benchmark=c2i",
    "model=class_refiner",
    "model.depth=2",
    "model.width=16",
    "model.heads=2",
    "model.context_start=1",
    "device=cpu",
    "repeats=1",
    "benchmark.steps=5",
    "benchmark.measured_steps=3",
)


def composed(*overrides, name="bench"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


def test_report_is_complete(tmp_path, capsys):
    bench(composed(*SMALL, f"out={tmp_path}"))
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["benchmark"] == "c2i"
    assert report["sizes"]["batch_size"] == report["sizes"]["sample_batch_size"] == 1
    assert report["matmul_flop_per_second"].keys() == {"float32", "bfloat16"}
    measured = {"images_per_second", "ratio", "peak_bytes", "flop_per_image", "flop_per_second", "share_of_matmul"}
    for task, names in (
        ("training", ["float32", "bfloat16", "selective", "full"]),
        ("sampling", ["float32", "bfloat16"]),
    ):
        rows = report[task]
        assert [row["variant"] for row in rows] == names
        assert rows[0]["ratio"] == 1
        for row in rows:
            assert all(row[key] > 0 for key in measured | {"limit_images_per_second"})
            assert row["mfu"] is None  # no maker's figure for a CPU
            if task == "training":
                assert row["error"] < (1e-5 if row["dtype"] == "float32" else 2e-2)
            else:
                assert row["equal_tokens"] > (0.999 if row["dtype"] == "float32" else 0.9)
    # Sampling: 5 steps of which t = 0.6, 0.8 are guided; training: three times the forward pass, nearly.
    ratio = report["sampling"][0]["flop_per_image"] / report["training"][0]["flop_per_image"]
    assert ratio == pytest.approx(7 / 3, rel=0.1)
    printed = capsys.readouterr().out
    assert all(variant.name in printed for variant in VARIANTS if not variant.compile)


@pytest.mark.parametrize("size", ["B", "L", "H", "G"])
def test_size_brings_the_model_and_the_interval_of_its_experiment(size):
    config = composed("benchmark=c2i", f"size={size}")
    experiment = composed(f"+experiment=c2i_ind_{size}", "tokenizer.ckpt=x", name="train")
    assert OmegaConf.to_container(config.model) == OmegaConf.to_container(experiment.model)
    assert config.benchmark.guidance_interval == experiment.sampler.guidance_interval


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["benchmark.batch_size=-1"], r"benchmark\.batch_size=-1"),
        (["benchmark.measured_steps=-1"], r"benchmark\.measured_steps=-1"),
        (["repeats=0"], "repeats=0"),
        (["benchmark.guidance_interval=[0.5,0.1]"], "guidance_interval"),
    ],
)
def test_mistakes(overrides, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        bench(composed(*SMALL, f"out={tmp_path}", *overrides))


def test_a_tokenizer_is_refused(tmp_path):
    config = composed("benchmark=c2i", "device=cpu", f"out={tmp_path}")
    config.model = composed("model=tokenizer_small").model
    with pytest.raises(UserError, match="size=B"):
        bench(config)


def test_passes_of_the_experiments():
    assert passes(Sampler(Linear(50), guidance=2.35, guidance_interval=(0.44, 1.0))) == 50 + 27
    assert passes(Sampler(Linear(50), guidance=2.0, guidance_interval=(0.42, 1.0))) == 50 + 28
    assert passes(Sampler(Linear(50), guidance=1.0)) == 50
    assert passes(Sampler(Linear(50), guidance=2.0)) == 100  # the first step, too
