import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from grn import sampler as sampling
from grn.bench import bench
from grn.benchmarks.c2i import VARIANTS, passes, without
from grn.cli import CONF
from grn.errors import UserError
from grn.networks.class_refiner import ClassRefiner
from grn.sampler import Labels, Linear, Sampler, refine

SMALL = (
    "what=c2i",
    "model=class_refiner",
    "model.depth=2",
    "model.width=16",
    "model.heads=2",
    "model.context_start=1",
    "device=cpu",
    "repeats=1",
    "what.steps=5",
    "what.measured_steps=3",
)


def composed(*overrides, name="bench"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


def test_report_is_complete(tmp_path, capsys):
    bench(composed(*SMALL, f"out={tmp_path}"))
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["what"] == "c2i"
    assert report["sizes"]["batch_size"] == report["sizes"]["sample_batch_size"] == 1
    assert report["matmul_flop_per_second"].keys() == {"float32", "bfloat16"}
    measured = {"images_per_second", "ratio", "peak_bytes", "flop_per_image", "flop_per_second", "share_of_matmul"}
    for task, names in (
        ("training", ["plain", "attention", "updates", "bfloat16", "selective", "full"]),
        ("sampling", ["plain", "attention", "one pass", "bfloat16"]),
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
    config = composed("what=c2i", f"size={size}")
    experiment = composed(f"+experiment=c2i_ind_{size}", "tokenizer.ckpt=x", name="train")
    assert OmegaConf.to_container(config.model) == OmegaConf.to_container(experiment.model)
    assert config.what.guidance_interval == experiment.sampler.guidance_interval


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["what.batch_size=-1"], r"what\.batch_size=-1"),
        (["what.measured_steps=-1"], r"what\.measured_steps=-1"),
        (["repeats=0"], "repeats=0"),
        (["what.guidance_interval=[0.5,0.1]"], "guidance_interval"),
    ],
)
def test_mistakes(overrides, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        bench(composed(*SMALL, f"out={tmp_path}", *overrides))


def test_a_tokenizer_is_refused(tmp_path):
    config = composed("what=c2i", "device=cpu", f"out={tmp_path}")
    config.model = composed("model=tokenizer_small").model
    with pytest.raises(UserError, match="size=B"):
        bench(config)


def test_passes_of_the_experiments():
    assert passes(Sampler(Linear(50), guidance=2.35, guidance_interval=(0.44, 1.0))) == 50 + 27
    assert passes(Sampler(Linear(50), guidance=2.0, guidance_interval=(0.42, 1.0))) == 50 + 28
    assert passes(Sampler(Linear(50), guidance=1.0)) == 50


@torch.no_grad()
def test_plain_is_the_same_function():
    torch.manual_seed(0)
    network = ClassRefiner(
        channels=3, classes=4, num_labels=5, size=4, depth=2, width=32, heads=2, bottleneck=8, context_start=1
    )
    for parameter in network.parameters():
        parameter.normal_(std=0.2)
    tokens, t, labels = torch.randint(4, (6, 3, 1, 4, 4)), torch.rand(6), torch.arange(6) % 5
    condition, ids = Labels(labels, 5), torch.arange(6)
    sampler = Sampler(Linear(6), guidance=2.0, guidance_interval=(0.3, 0.9))

    def sample():
        predict = lambda tokens, t, condition: network(tokens, t, condition.index)  # noqa: E731
        return refine(predict, condition, sampler, shape=(3, 1, 4, 4), classes=4, seed=0, ids=ids).tokens

    logits, samples, guided = network(tokens, t, labels), sample(), sampling._guided_logits
    with without("attention", "one pass", "updates"):
        assert sampling._guided_logits is not guided
        torch.testing.assert_close(network(tokens, t, labels), logits, atol=1e-5, rtol=1e-5)
        assert (sample() == samples).double().mean() > 0.99  # rounding may move a token that lies on an edge
    assert sampling._guided_logits is guided
