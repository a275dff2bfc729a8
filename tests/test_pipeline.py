"""GRNPipeline: the samples of grn.sample, of classes and of texts; folders there and back; mistakes on one line."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

import grn
from grn import pipeline
from grn.cli import CONF
from grn.errors import UserError
from grn.export import export
from grn.initial_image import start_from_image
from grn.modules import module_from_config
from grn.networks import pretrained
from grn.networks.tokenizer import HBQTokenizer
from grn.pipeline import GRNPipeline
from grn.sample import sample
from grn.sampler import Cosine, EntropyGuided, Linear

CLASSES = "+experiment=digits_c2i model.channels=3 model.classes=4 model.num_labels=5 model.size=4 model.depth=2"
CLASSES += " model.width=32 model.heads=2 model.bottleneck=8 model.context_start=1 model.context_tokens=2"
TEXTS = "+experiment=digits_t2i model.channels=3 model.classes=4 model.depth=2 model.width=24 model.heads=2"
TEXTS += " model.mlp_ratio=11 model.text_width=16 model.max_text=32 text_encoder.width=16 text_encoder.depth=1"
TEXTS += " text_encoder.heads=2 text_encoder.hidden=16 text_encoder.max_length=32 training.size=[16,32]"
CLASSES += " sampler.schedule.scale=100 sampler.schedule.offset=-36"  # plans are neither all short nor all long
TEXTS += " sampler.schedule.scale=300 sampler.schedule.offset=-283"
STEPS = "sampler.schedule.warmup=1 sampler.schedule.min_steps=2 sampler.schedule.max_steps=8"
PICTURE = Image.new("RGB", (9, 9))
PROMPTS = ["a seven", "a three left of an eight", ""]


def composed(name, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, [str(override) for override in overrides])


def write_run(folder, overrides, temporal=False):
    """A run folder as training leaves it, of a network that says something."""
    torch.manual_seed(0)
    tokenizer = HBQTokenizer(
        latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=(1, 2), blocks_per_stage=1, temporal=(temporal,)
    ).save_pretrained(folder / "tokenizer", provenance={"step": 5})
    module = module_from_config(composed("train", f"tokenizer.ckpt={tokenizer}", *overrides.split(), *STEPS.split()))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.normal_(std=0.3, generator=generator)
    contents = {"state_dict": module.state_dict(), "global_step": 12}
    module.on_save_checkpoint(contents)
    (folder / "checkpoints").mkdir()
    torch.save(contents, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("classes"), CLASSES)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("texts"), TEXTS)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_run(
        tmp_path_factory.mktemp("videos"), f"{TEXTS} training.frames=5 training.context_latents=1", temporal=True
    )


def said_by_command(out, *overrides):
    """(The report of grn.sample, its images)."""
    config = composed("sample", *overrides, "film=false", "images=true", "device=cpu", f"out={out}")
    if isinstance(config.prompts, str):
        config.prompts = json.loads(config.prompts)
    sample(config)
    pictures = [np.asarray(Image.open(path)) for path in sorted((out / "images").iterdir())]
    return json.loads((out / "samples.json").read_text()), np.stack(pictures)


def assert_same(result, report, pictures):
    assert result.steps.tolist() == report["steps"]
    assert [round(e, 5) for e in result.entropy.tolist()] == report["entropy"]
    assert np.array_equal(np.stack([np.asarray(image) for image in result.images]), pictures)


@pytest.mark.parametrize("is_exported", [False, True])
def test_clips_are_those_of_the_command(videos, tmp_path, is_exported):
    """With the number of frames that the run had, another one, and from a first frame."""
    pipe = GRNPipeline.from_pretrained(videos)
    if is_exported:
        pipe = GRNPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "export"))
    assert (pipe.module.frames, pipe.module.context_latents) == (5, 1)
    asked = [f"ckpt={videos}", f"prompts={json.dumps(PROMPTS[:2])}", "num=2", "seed=3"]
    report, pictures = said_by_command(tmp_path / "own", *asked)
    result = pipe(PROMPTS[:2], seed=3, progress=False)
    assert (result.images, len(result.frames), len(result.frames[0])) == (None, 2, 5)
    assert result.tokens.shape == (2, 3, 3, 4, 8)
    assert_same(replace(result, images=[clip[0] for clip in result.frames]), report, pictures)
    pixels = pipe(PROMPTS[:2], seed=3, progress=False, output="pt").frames
    assert pixels.shape == (2, 5, 3, 16, 32)
    assert np.array_equal(pixels[1, 4].permute(1, 2, 0), np.asarray(result.frames[1][4]))
    assert pipe(PROMPTS[0], frames=1, seed=3, progress=False).images[0].size == (32, 16)

    frame = Image.linear_gradient("L").convert("RGB").resize((32, 16))
    frame.save(tmp_path / "frame.png")
    report, pictures = said_by_command(tmp_path / "init", *asked, f"init={tmp_path / 'frame.png'}", "frames=7")
    result = pipe(PROMPTS[:2], seed=3, frames=7, init=frame, progress=False)
    assert len(result.frames[0]) == 7
    assert_same(replace(result, images=[clip[-1] for clip in result.frames]), report, pictures)


def test_grn_itself_is_quick_to_import():
    lines = "import grn, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", lines], cwd=Path(grn.__file__).parents[1], check=True)
    assert grn.GRNPipeline is GRNPipeline
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        _ = grn.Pipeline


def test_classes_are_those_of_the_command(classes, tmp_path):
    pipe = GRNPipeline.from_pretrained(classes)
    report, pictures = said_by_command(tmp_path / "own", f"ckpt={classes}", "labels=[3,1,4]", "num=6", "seed=5")
    result = pipe(labels=[3, 1, 4, 3, 1, 4], seed=5, progress=False)
    assert_same(result, report, pictures)
    assert len(set(report["steps"])) > 1
    assert result.tokens.shape == (6, 3, 1, 4, 4)
    assert (result.images[0].size, result.seed) == ((16, 16), 5)

    turns = pipe(labels=[3, 1, 4], num_images_per_prompt=2, seed=5, progress=False)
    assert torch.equal(turns.tokens, result.tokens[[0, 3, 1, 4, 2, 5]])
    assert [np.asarray(image).tolist() for image in turns.images] == pictures[[0, 3, 1, 4, 2, 5]].tolist()

    overrides = "sampler=linear sampler.schedule.steps=3 sampler.guidance=2.5 sampler.guidance_interval=[0,0.5]"
    overrides += " sampler.temperature=1.3"
    report, pictures = said_by_command(tmp_path / "other", f"ckpt={classes}", "num=5", *overrides.split())
    asked = {"steps": 3, "guidance": 2.5, "guidance_interval": (0, 0.5), "temperature": 1.3}
    assert_same(pipe(labels=range(5), seed=0, progress=False, **asked), report, pictures)


def test_texts_are_those_of_the_command(texts, tmp_path):
    pipe = GRNPipeline.from_pretrained(texts / "checkpoints" / "last.ckpt")
    overrides = [f"ckpt={texts}", "num=3", "seed=2", "sampler=entropy", "sampler.guidance=3", "height=24", "width=16"]
    prompts = "prompts='" + json.dumps(PROMPTS) + "'"
    report, pictures = said_by_command(tmp_path / "asked", *overrides, prompts, "negative_prompt=an eight")
    asked = {"height": 24, "width": 16, "guidance": 3, "steps": "entropy", "seed": 2, "progress": False}
    result = pipe(PROMPTS, negative_prompt="an eight", **asked)
    assert_same(result, report, pictures)
    assert len(set(report["steps"])) > 1
    assert result.images[0].size == (16, 24)
    assert not torch.equal(pipe(PROMPTS, **asked).tokens, result.tokens)
    alone = pipe(PROMPTS[0], negative_prompt="an eight", **asked)
    assert torch.equal(alone.tokens, result.tokens[:1])
    # What was asked for once is not what is drawn ever after.
    own = pipe.module
    assert (own.prompts[0], own.negative_prompt, own.size) == ("a zero left of a zero", "", (16, 32))


def test_seeds_and_generators(classes):
    pipe, asked = GRNPipeline.from_pretrained(classes), {"labels": [2] * 3, "progress": False, "output": "tokens"}

    def of_generator():
        return torch.Generator().manual_seed(7)

    first, again = pipe(generator=of_generator(), **asked), pipe(generator=of_generator(), **asked)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.tokens, pipe(seed=first.seed, **asked).tokens)
    shared = of_generator()
    assert pipe(generator=shared, **asked).seed == first.seed
    assert pipe(generator=shared, **asked).seed != first.seed
    torch.manual_seed(0)
    seeds = [pipe(**asked).seed for _ in range(2)]
    torch.manual_seed(0)
    assert [pipe(**asked).seed for _ in range(2)] == seeds
    assert seeds[0] != seeds[1]


def test_outputs(classes):
    pipe, asked = GRNPipeline.from_pretrained(classes), {"labels": [2, 0], "progress": False, "seed": 1}
    pictures, pixels, tokens = (pipe(output=output, **asked) for output in ("pil", "pt", "tokens"))
    assert pixels.images.shape == (2, 3, 16, 16)
    assert pixels.images.dtype == torch.uint8
    assert np.array_equal(np.asarray(pictures.images[1]), pixels.images[1].permute(1, 2, 0))
    assert tokens.images is None
    assert torch.equal(tokens.tokens, pixels.tokens)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_callback_sees_every_step_of_every_image(classes, batch_size):
    pipe, seen = GRNPipeline.from_pretrained(classes), {}

    def watch(step):
        for row, predicted, t in zip(step.rows.tolist(), step.predicted, step.t_next.tolist()):
            seen.setdefault(row, []).append((t, predicted))

    result = pipe(labels=[3, 1, 4], num_images_per_prompt=2, seed=5, callback_on_step=watch, batch_size=batch_size)
    assert sorted(seen) == list(range(6))
    for row, steps in seen.items():
        assert len(steps) == result.steps[row]
        assert [t for t, _ in steps] == sorted(t for t, _ in steps)
        assert steps[-1][0] == 1
        assert torch.equal(steps[-1][1], result.tokens[row])


def test_the_bar_comes_to_its_end(classes, monkeypatch):
    bars = []

    class Recorder(pipeline.Progress):
        def update(self, task, *, completed):
            bars.append((self.disable, completed, self.tasks[task].total))

    monkeypatch.setattr(pipeline, "Progress", Recorder)
    pipe = GRNPipeline.from_pretrained(classes)
    for shown in (True, False):
        bars.clear()
        pipe(labels=[3, 1, 4], batch_size=2, seed=5, progress=shown)
        assert {disabled for disabled, _, _ in bars} == {not shown}
        assert [come for _, come, _ in bars] == sorted(come for _, come, _ in bars)
        assert bars[-1][1:] == (3, 3)


def test_which_steps(classes):
    pipe = GRNPipeline.from_pretrained(classes)

    def taken(steps):
        return pipe(labels=[0, 1], seed=1, steps=steps, progress=False, output="tokens").steps.tolist()

    assert taken(3) == [3, 3]
    assert taken(Cosine(4)) == taken(Linear(4)) == [4, 4]
    assert taken("entropy") == taken(None)
    pipe.module.sampler = pipe._sampler(Cosine(5), None, None, None)
    assert taken(None) == [5, 5]
    assert pipe._sampler(6, None, None, None).schedule == Cosine(6)
    assert pipe._sampler("entropy", None, None, None).schedule == EntropyGuided()


@pytest.mark.parametrize("kind", ["classes", "texts"])
def test_from_an_image(kind, request, tmp_path):
    pipe = GRNPipeline.from_pretrained(request.getfixturevalue(kind))
    asked = {"labels": [1, 2]} if kind == "classes" else {"prompt": PROMPTS[:2], "height": 16, "width": 16}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 54, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, 27, 40))
    pipe_of = {"seed": 3, "progress": False, "output": "tokens"} | asked
    found = pipe(init=image, mask=mask, **pipe_of).tokens
    if kind == "texts":
        pipe.module.size = (16, 16)
    given = start_from_image(pipe.module, tmp_path / "image.png").tokens
    assert torch.equal(found[..., 2:], given.expand_as(found)[..., 2:])
    assert (found != given)[..., :2].any()
    from_file = pipe(init=tmp_path / "image.png", strength=0.5, **pipe_of)
    assert torch.equal(pipe(init=image.convert("RGBA"), strength=0.5, **pipe_of).tokens, from_file.tokens)
    assert (from_file.steps < pipe(**pipe_of, steps=Linear(8)).steps).all()


@pytest.mark.parametrize("kind", ["classes", "texts"])
def test_there_and_back(kind, request, tmp_path):
    run = request.getfixturevalue(kind)
    asked = {"labels": [1, 2]} if kind == "classes" else {"prompt": PROMPTS}
    pipe = GRNPipeline.from_pretrained(run)
    folder = pipe.save_pretrained(tmp_path / "saved")
    again = GRNPipeline.from_pretrained(folder)
    first, second = (it(seed=4, progress=False, **asked) for it in (pipe, again))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.steps, second.steps)
    by_command = export(composed("export", f"ckpt={run}", f"out={tmp_path}/exported"))
    assert files(folder) == files(by_command) == files(again.save_pretrained(tmp_path / "again"))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_from_the_hub(texts, tmp_path, monkeypatch):
    folder = GRNPipeline.from_pretrained(texts).save_pretrained(tmp_path / "saved")

    def snapshot_download(hub_id, *, allow_patterns, **options):
        assert hub_id == "grn-tests/digits"
        asked.append(options)
        for name in files(folder).keys() & set(allow_patterns):
            (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, tmp_path / "hub" / name)
        return str(tmp_path / "hub")

    asked = []
    monkeypatch.setattr(pretrained, "snapshot_download", snapshot_download)
    for name in ("grn-tests/digits", "hf://grn-tests/digits"):
        assert GRNPipeline.from_pretrained(name).module.size == (16, 32)
    assert files(tmp_path / "hub") == files(folder)
    asked.clear()
    options = {"revision": "v1", "cache_dir": tmp_path / "cache", "token": "secret", "local_files_only": True}
    pipe = GRNPipeline.from_pretrained("grn-tests/digits", dtype=torch.bfloat16, **options)
    assert {parameter.dtype for parameter in pipe.module.network.parameters()} == {torch.bfloat16}
    assert asked
    assert all(given == options for given in asked)


@pytest.mark.parametrize("kind", ["classes", "texts"])
def test_another_precision(kind, request):
    pipe = GRNPipeline.from_pretrained(request.getfixturevalue(kind))
    asked = {"labels": [1, 2]} if kind == "classes" else {"prompt": PROMPTS[:2]}
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert pipe.to(torch.bfloat16).device == torch.device("cpu")
    assert {parameter.dtype for parameter in pipe.module.network.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in pipe.module.tokenizer.parameters()} == {torch.float32}
    half = pipe(seed=4, progress=False, **asked)
    assert half.entropy.dtype == torch.float32
    assert (pipe.to(torch.float32)(seed=4, progress=False, **asked).entropy - half.entropy).abs().max() < 0.1


@pytest.mark.parametrize(
    ("kind", "asked", "complaint"),
    [
        ("classes", {}, r"^labels=\[\]: labels of this checkpoint are 0\.\.4"),
        ("classes", {"labels": [0, 5]}, r"^labels=\[0, 5\]: labels of this checkpoint"),
        ("classes", {"labels": 2.5}, r"^labels=\[2\.5\]: labels of this checkpoint"),
        ("classes", {"labels": ["one"]}, r"^labels=\['one'\]: labels of this checkpoint"),
        ("classes", {"prompt": "a seven"}, "^prompt is for refiners of texts, .* give labels="),
        ("classes", {"labels": 0, "height": 16}, "^height is for refiners of texts"),
        ("texts", {}, "^prompt=None: a text, or a list"),
        ("texts", {"prompt": ["a", 3]}, r"^prompt=\['a', 3\]: a text, or a list"),
        ("texts", {"prompt": 3}, "^prompt=3: a text, or a list"),
        ("texts", {"labels": 3}, "^labels=3 are for refiners of classes, .* give a prompt"),
        ("texts", {"prompt": "a", "negative_prompt": ["a"]}, r"^negative_prompt=\['a'\]: one text"),
        ("texts", {"prompt": "a", "width": 18}, r"multiples of the tokenizer's stride 4, got \(16, 18\)"),
        ("texts", {"prompt": "a", "height": 16.0}, r"^height=16\.0: a whole number of pixels"),
        ("classes", {"labels": 0, "steps": "many"}, "^steps=many: a whole number, "),
        ("classes", {"labels": 0, "steps": 0}, r"^sampler\.schedule\.steps must be at least 1, got 0"),
        ("classes", {"labels": 0, "guidance": "much"}, "^guidance=much: a number"),
        ("classes", {"labels": 0, "temperature": 0}, r"^sampler\.temperature must be positive, got 0"),
        ("classes", {"labels": 0, "guidance_interval": 0.5}, r"^guidance_interval=0\.5: two numbers"),
        ("classes", {"labels": 0, "seed": 1, "generator": torch.Generator()}, "^seed=1: give it or a generator"),
        ("classes", {"labels": 0, "seed": 1.5}, r"^seed=1\.5: a whole number"),
        ("classes", {"labels": 0, "generator": [torch.Generator()]}, r"^generator=.*: one torch\.Generator"),
        ("classes", {"labels": 0, "num_images_per_prompt": 0}, "^num_images_per_prompt=0 must be a whole number"),
        ("classes", {"labels": 0, "batch_size": 0}, "^batch_size=0 must be a whole number, at least 1"),
        ("classes", {"labels": 0, "output": "np"}, "^output=np: choose among pil, pt, tokens"),
        ("classes", {"labels": 0, "init": torch.zeros(3, 9, 9)}, "^init: the path of an image, .* not Tensor"),
        ("classes", {"labels": 0, "init": np.zeros((9, 9, 3))}, "^init: the path of an image, .* not ndarray"),
        ("classes", {"labels": 0, "init": b"x.png"}, "^init: the path of an image, .* not bytes"),
        ("classes", {"labels": 0, "init": [5]}, "^init: several pictures are for clips"),
        ("classes", {"labels": 0, "init": PICTURE, "mask": True}, "^mask: the path of an image, .* not bool"),
        ("videos", {"prompt": "a", "init": torch.zeros(3, 9, 9)}, "^init: the path of an image, .* not Tensor"),
        ("videos", {"prompt": "a", "init": b"x.mp4"}, "^init: the path of an image, .* not bytes"),
        ("videos", {"prompt": "a", "init": [5]}, "^init: the path of an image, .* not int"),
        ("videos", {"prompt": "a", "init": [PICTURE] * 2, "frames": 1}, "^init: several pictures are for clips"),
        ("classes", {"labels": 0, "strength": 0.5}, r"^strength=0\.5 .*give init="),
        (
            "classes",
            {"labels": 0, "init": PICTURE, "mask": Image.new("L", (8, 8))},
            "is 8x8, but init=.* is 9x9",
        ),
    ],
)
def test_mistakes_take_one_line(kind, asked, complaint, request):
    pipe = GRNPipeline.from_pretrained(request.getfixturevalue(kind))
    with pytest.raises(UserError, match=complaint) as error:
        pipe(**asked)
    assert "\n" not in str(error.value)


def test_nothing_there(classes, tmp_path):
    for place, complaint in (
        (tmp_path / "nothing", "no such checkpoint or run folder"),
        (classes / "tokenizer", "no checkpoint in run folder"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            GRNPipeline.from_pretrained(place)
        assert "\n" not in str(error.value)
