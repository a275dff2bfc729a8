"""Suites of prompts: read, drawn by a tiny text refiner of random weights, scored and laid out."""

import json
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from grn.evaluation import evaluate
from grn.evaluation.suites import KINDS, Layout, Suite, read_suite
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.metrics import geneval
from grn.networks.captioned_refiner import CaptionedRefiner
from grn.networks.text_encoder import ByteT5
from grn.networks.text_refiner import TextRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.sampling.text_bundle import TextRefinerBundle

LINES = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"},
    {"tag": "two_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog, asleep"},
]


def refiner(sizes):
    torch.manual_seed(0)
    encoder = ByteT5(width=16, depth=1, heads=2, hidden=16, max_length=32)
    network = CaptionedRefiner(TextRefiner(**sizes), encoder)
    network.init_weights(torch.Generator().manual_seed(3))
    tokenizer = HBQTokenizer(
        latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=(1, 2), blocks_per_stage=1, temporal=(False,)
    )
    arguments = {"prompts": ["x"], "size": (16, 16), "labeling": "ind", "text_encoder": None}
    return TextRefinerBundle(network, tokenizer, Sampler(Linear(2)), **arguments).eval()


SIZES = {
    "channels": 3,
    "classes": 4,
    "depth": 2,
    "width": 24,
    "attention": "one_way",
    "heads": 2,
    "text_width": 16,
    "max_text": 32,
    "mlp_ratio": 11,
}


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """evaluated(*overrides): what evaluate writes into metrics.json of a tiny refiner and GenEval's two lines."""
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, LINES)) + "\n\n")

    class Detector:
        names = frozenset(("cat", "dog"))

        def __init__(self, path, **_):
            pass

        def __call__(self, image):
            return [geneval.Detection("cat", 0.9, (0.0, 0.0, 4.0, 4.0))]

    monkeypatch.setattr(geneval, "Mask2Former", Detector)
    monkeypatch.setattr(geneval, "CLIPEncoder", lambda *_, **__: None)
    monkeypatch.setattr(evaluate, "_load", lambda config: (refiner(SIZES), None, {"ckpt": "x", "step": 3}))

    def run(*overrides, name="out"):
        given = [f"suite.prompts={tmp_path}/lines.jsonl", f"out={tmp_path}/{name}", "wandb=false", "device=cpu"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("evaluate", ["ckpt=x", *given, *overrides])
        evaluate.evaluate(config)
        return json.loads((tmp_path / name / "metrics.json").read_text())

    return run


def test_geneval_in_one_command(evaluated, tmp_path):
    report = evaluated("suite=geneval", "suite.layout=true", "seed=4")
    assert report["num"] == 8
    assert report["seed"] == 4
    assert report["metrics"]["geneval"] == 0.5
    assert report["metrics"]["geneval_single_object"] == 1.0
    assert report["metrics"]["geneval_two_object"] == 0.0
    assert (report["suite"]["name"], report["suite"]["prompts"], report["suite"]["rewritten_sha256"]) == (
        "geneval",
        2,
        None,
    )
    assert len(report["suite"]["prompts_sha256"]) == 64
    laid = tmp_path / "out" / "geneval"
    assert sorted(str(path.relative_to(laid)) for path in laid.rglob("*.*")) == [
        *("00000/metadata.jsonl", *(f"00000/samples/000{n}.png" for n in range(4))),
        *("00001/metadata.jsonl", *(f"00001/samples/000{n}.png" for n in range(4))),
    ]
    assert json.loads((laid / "00001" / "metadata.jsonl").read_text()) == LINES[1]
    again = evaluated("suite=geneval", "suite.layout=true", "seed=4", "batch_size=3", name="again")
    picture = "geneval/00001/samples/0003.png"
    assert (tmp_path / "out" / picture).read_bytes() == (tmp_path / "again" / picture).read_bytes()
    assert again["settings"] == report["settings"]


def test_rewritten_prompts_are_drawn_and_recorded(evaluated, tmp_path):
    (tmp_path / "rewritten.txt").write_text("one cat on a mat\na sleeping dog\n")
    plain = evaluated("suite=geneval", "suite.samples=1")
    report = evaluated("suite=geneval", "suite.samples=1", f"suite.rewritten={tmp_path}/rewritten.txt", name="b")
    assert report["suite"]["prompts_sha256"] == plain["suite"]["prompts_sha256"]
    assert report["suite"]["rewritten_sha256"] is not None
    assert (tmp_path / "out" / "samples.png").read_bytes() != (tmp_path / "b" / "samples.png").read_bytes()
    with pytest.raises(UserError, match=r"has results of other settings \(suite\."):
        evaluated("suite=geneval", "suite.samples=1", f"suite.rewritten={tmp_path}/rewritten.txt")
    (tmp_path / "rewritten.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"^suite\.rewritten: .* has 1 prompts, one is needed for each of 2"):
        evaluated("suite=geneval", f"suite.rewritten={tmp_path}/rewritten.txt", name="c")


def test_dpg_bench_gets_grids(evaluated, tmp_path):
    (tmp_path / "prompts").mkdir()
    for name in ("COCO_1", "vrd7"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"a long\nprompt {name}\n")
    report = evaluated("suite=dpg_bench", f"suite.prompts={tmp_path}/prompts", "suite.rewritten=null")
    assert report["num"] == 8
    laid = tmp_path / "out" / "dpg_bench"
    assert sorted(path.name for path in laid.iterdir()) == ["COCO_1.png", "vrd7.png"]
    grid = np.asarray(Image.open(laid / "vrd7.png"))
    shown = np.asarray(Image.open(tmp_path / "out" / "samples.png"))
    assert grid.shape == (32, 32, 3)
    scale = 6  # 96 // 16
    for sample in range(4):  # number 1 + 2 * sample of the grid of all
        left = scale * (2 + (1 + 2 * sample) * 18)
        cell = shown[2 * scale : 18 * scale : scale, left : left + 16 * scale : scale]
        tile = grid[sample // 2 * 16 :, sample % 2 * 16 :][:16, :16]
        assert (tile == cell).all()


def suite(*prompts, samples=2):
    return Suite("x", prompts, prompts, tuple({"prompt": p} for p in prompts), None, samples, {})


def test_names_of_files():
    own = suite("a red dog", "two cats")
    assert KINDS["vbench"](own, 1, 0) == "two cats-0.mp4"
    assert [KINDS["t2i_compbench"](own, n, s) for n in (0, 1) for s in (0, 1)] == [
        *("samples/a red dog_000000.png", "samples/a red dog_000001.png"),
        *("samples/two cats_000002.png", "samples/two cats_000003.png"),
    ]


@pytest.mark.parametrize(
    ("kind", "clips", "prompts", "line"),
    [
        ("vbench", False, ("a",), "of images, this refiner's samples are not|of clips"),
        ("geneval", True, ("a",), r"suite\.kind=geneval is of"),
        ("t2i_compbench", False, ("../../evil",), "names files by prompts"),
        ("t2i_compbench", False, ("x" * 300,), "names files by prompts"),
        ("dpg_bench", False, ("a",), r"suite\.samples=2"),
        ("other", False, ("a",), r"suite\.kind=other: choose among"),
    ],
)
def test_layouts_that_cannot_be(tmp_path, kind, clips, prompts, line):
    with pytest.raises(UserError, match=line):
        Layout(kind, suite(*prompts), tmp_path, clips=clips)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "there is no file .*; it is here"),
        ("", "has 0 prompts"),
        ("[1]\n", "line 1 is no JSON object with a prompt"),
        ('{"prompt": "x"}\n{"prompt": 3}\n', "line 2 is no JSON object"),
        ("[" * 100_000, "line 1 is no JSON object"),
    ],
)
def test_prompts_that_are_none(tmp_path, content, line):
    if content is not None:
        (tmp_path / "p.jsonl").write_text(content)
    config = {"name": "x", "prompts": f"{tmp_path}/p.jsonl", "source": "here", "samples": 1, "rewritten": None}
    with pytest.raises(UserError, match=rf"^suite\.prompts: .*{line}"):
        read_suite(OmegaConf.create(config))


def test_every_suite_is_whole():
    for path in (CONF / "suite").glob("*.yaml"):
        config = OmegaConf.load(path)
        if config.name is not None:
            assert {"prompts", "samples", "rewritten", "layout", "kind", "scorer"} <= config.keys()
            assert config.kind in KINDS
            assert path.stem == config.name


def test_vbench_gets_clips(tmp_path):
    pixels = torch.randint(0, 256, (2, 3, 5, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    layout = Layout("vbench", suite("a red dog", "two cats"), tmp_path, clips=True, fps=8.0)
    layout.add(SimpleNamespace(ids=torch.tensor([1, 2]), pixels=pixels))
    layout.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a red dog-1.mp4", "two cats-0.mp4"]
    with av.open(str(tmp_path / "two cats-0.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5
        assert container.streams.video[0].average_rate == 8
