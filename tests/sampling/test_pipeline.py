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
from text_shards import frozen, write_text_encoder

import grn
from grn.method.sampler import Sampler
from grn.method.schedules import Cosine, EntropyGuided, Linear, Shifted
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.sampling import pipeline
from grn.sampling.pipeline import GRNPipeline
from grn.sampling.sample import sample
from grn.sampling.start_image import start_from_image
from grn.training.building import module_from_config
from grn.training.export import export
from grn.weights import pretrained

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
    assert (pipe.bundle.frames, pipe.bundle.context_latents) == (5, 1)
    asked = [f"ckpt={videos}", f"prompts={json.dumps(PROMPTS[:2])}", "num=2", "seed=3"]
    report, pictures = said_by_command(tmp_path / "own", *asked)
    result = pipe(PROMPTS[:2], seed=3)
    assert (result.images, len(result.frames), len(result.frames[0])) == (None, 2, 5)
    assert result.tokens.shape == (2, 3, 3, 4, 8)
    assert_same(replace(result, images=[clip[0] for clip in result.frames]), report, pictures)
    pixels = pipe(PROMPTS[:2], seed=3, output_type="pt").frames
    assert pixels.shape == (2, 5, 3, 16, 32)
    assert np.array_equal(pixels[1, 4].permute(1, 2, 0), np.asarray(result.frames[1][4]))
    assert pipe(PROMPTS[0], num_frames=1, seed=3).images[0].size == (32, 16)

    frame = Image.linear_gradient("L").convert("RGB").resize((32, 16))
    frame.save(tmp_path / "frame.png")
    report, pictures = said_by_command(tmp_path / "init", *asked, f"init={tmp_path / 'frame.png'}", "frames=7")
    result = pipe(PROMPTS[:2], seed=3, num_frames=7, image=frame)
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
    result = pipe(labels=[3, 1, 4, 3, 1, 4], seed=5)
    assert_same(result, report, pictures)
    assert len(set(report["steps"])) > 1
    assert result.tokens.shape == (6, 3, 1, 4, 4)
    assert (result.images[0].size, result.seed) == ((16, 16), 5)

    turns = pipe(labels=[3, 1, 4], num_images_per_prompt=2, seed=5)
    assert torch.equal(turns.tokens, result.tokens[[0, 3, 1, 4, 2, 5]])
    assert [np.asarray(image).tolist() for image in turns.images] == pictures[[0, 3, 1, 4, 2, 5]].tolist()

    overrides = "sampler=linear sampler.schedule.steps=3 sampler.guidance=2.5 sampler.guidance_interval=[0,0.5]"
    overrides += " sampler.temperature=1.3"
    report, pictures = said_by_command(tmp_path / "other", f"ckpt={classes}", "num=5", *overrides.split())
    asked = {"num_inference_steps": 3, "guidance_scale": 2.5, "guidance_interval": (0, 0.5), "temperature": 1.3}
    assert_same(pipe(labels=range(5), seed=0, **asked), report, pictures)


def test_texts_are_those_of_the_command(texts, tmp_path):
    pipe = GRNPipeline.from_pretrained(texts / "checkpoints" / "last.ckpt")
    overrides = [f"ckpt={texts}", "num=3", "seed=2", "sampler=entropy", "sampler.guidance=3", "height=24", "width=16"]
    prompts = "prompts='" + json.dumps(PROMPTS) + "'"
    report, pictures = said_by_command(tmp_path / "asked", *overrides, prompts, "negative_prompt=an eight")
    asked = {"height": 24, "width": 16, "guidance_scale": 3, "num_inference_steps": "entropy", "seed": 2}
    result = pipe(PROMPTS, negative_prompt="an eight", **asked)
    assert_same(result, report, pictures)
    assert len(set(report["steps"])) > 1
    assert result.images[0].size == (16, 24)
    assert not torch.equal(pipe(PROMPTS, **asked).tokens, result.tokens)
    alone = pipe(PROMPTS[0], negative_prompt="an eight", **asked)
    assert torch.equal(alone.tokens, result.tokens[:1])
    # What was asked for once is not what is drawn ever after.
    own = pipe.bundle
    assert (own.prompts[0], own.negative_prompt, own.size) == ("a zero left of a zero", "", (16, 32))


def test_seeds_and_generators(classes):
    pipe, asked = GRNPipeline.from_pretrained(classes), {"labels": [2] * 3, "output_type": "latent"}

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


def test_a_generator_for_each_image(classes):
    """Each image is the one that its generator draws alone."""
    pipe, asked = GRNPipeline.from_pretrained(classes), {"output_type": "latent"}
    generators = [torch.Generator().manual_seed(number) for number in (1, 2, 1)]
    together = pipe(labels=[3, 1, 3], generator=generators, **asked)
    assert torch.equal(together.tokens[0], together.tokens[2])
    for place, (label, number) in enumerate([(3, 1), (1, 2)]):
        alone = pipe(labels=label, generator=torch.Generator().manual_seed(number), **asked)
        assert torch.equal(alone.tokens[0], together.tokens[place])
        assert alone.seed == together.seed[place]


def test_a_stream_is_what_a_call_draws(classes):
    pipe = GRNPipeline.from_pretrained(classes)
    request = pipe.request(labels=[3, 1, 4], seed=5)
    stream, seen = pipe.stream(request), []
    for step in stream:
        seen.append(step)
        rows, maps = stream.maps()  # what the next step sees, of those that are not done
        going = torch.nonzero(step.t_next < 1).squeeze(1)
        assert torch.equal(rows, step.rows[going])
        if len(rows):
            assert torch.equal(maps[step.kept[going]], step.predicted[going][step.kept[going]])
    rows, refined = stream.take(3)
    assert rows.tolist() == [0, 1, 2]
    assert torch.equal(refined.tokens, pipe(labels=[3, 1, 4], seed=5, output_type="latent").tokens)
    assert len(seen) == refined.steps.max()
    assert pipe.decode(refined.tokens).shape == (3, 1, 3, 16, 16)


def test_tokens_are_erased_and_drawn_again_repeatably(classes):
    """A paused stream goes on from what was erased; the same request with the erasures draws the same samples."""
    pipe = GRNPipeline.from_pretrained(classes)
    request = pipe.request(labels=[3, 1], num_inference_steps=6, seed=5)
    untouched, stream = pipe.stream(request), pipe.stream(request)
    left = torch.zeros(1, 4, 4, dtype=torch.bool)
    left[..., :2] = True
    for _ in range(4):
        step, plain = next(stream), next(untouched)
        assert torch.equal(step.predicted, plain.predicted)
    _, before = stream.maps()
    erasure = stream.erase(1, left)
    assert (erasure.sample, erasure.after) == (1, 4)
    _, after = stream.maps()
    noise = next(iter(pipe.stream(request))).tokens
    assert torch.equal(after[1][..., :2], noise[1][..., :2])
    assert torch.equal(after[1][..., 2:], before[1][..., 2:])
    assert torch.equal(after[0], before[0])
    seen = next(stream)
    assert torch.equal(seen.tokens, after)
    list(stream)
    list(untouched)
    (_, changed), (_, plain) = stream.take(2), untouched.take(2)
    assert torch.equal(changed.tokens[0], plain.tokens[0])
    assert torch.equal(changed.trace[0], plain.trace[0])
    assert (changed.trace[1] == plain.trace[1]).tolist()[:5] == [True] * 4 + [False]
    for batch_size in (2, 1):
        again = pipe.sample(replace(request, erasures=(erasure,)), batch_size=batch_size)
        refined = [batch.refined for batch in again]
        assert torch.equal(torch.cat([part.tokens for part in refined]), changed.tokens)
        torch.testing.assert_close(torch.cat([part.trace for part in refined]), changed.trace)
    with pytest.raises(UserError, match=r"^sample 1 is not being refined: it waits or is done"):
        stream.erase(1, left)
    with pytest.raises(UserError, match=r"^positions to erase must be bool \[1, 4, 4\], got \[4, 4\]"):
        pipe.stream(request).erase(1, left[0])
    for wrong, complaint in (
        (replace(erasure, positions=left[:, :1, :1]), r"sample 1 after 4 steps: positions \[1, 1, 1\], but maps are"),
        (replace(erasure, positions=left.long()), "sample 1 after 4 steps: positions"),
        (replace(erasure, sample=2), "sample 2 after 4 steps, of num=2 samples that take 6 at most"),
        (replace(erasure, after=6), "sample 1 after 6 steps, of num=2 samples that take 6 at most"),
    ):
        with pytest.raises(UserError, match=f"^erasures: of {complaint}"):
            pipe.stream(replace(request, erasures=(wrong,)))


def test_a_text_refiner_from_before_there_was_another_attention(texts, tmp_path):
    run = shutil.copytree(texts, tmp_path / "run")
    file = run / "checkpoints" / "last.ckpt"
    contents = torch.load(file, weights_only=True)
    assert contents["config"]["model"].pop("attention") == "one_way"
    torch.save(contents, file)
    asked = {"seed": 2, "num_inference_steps": 3, "output_type": "latent"}
    old, new = (GRNPipeline.from_pretrained(folder)(PROMPTS[0], **asked) for folder in (run, texts))
    assert torch.equal(old.tokens, new.tokens)


def test_a_device_that_is_not_there_leaves_it_where_it_was(classes):
    pipe = GRNPipeline.from_pretrained(classes)
    for move in (pipe.to, pipe.enable_model_cpu_offload):
        for device in ("vulkan", "nonsense"):
            with pytest.raises(UserError, match=rf"^device={device}: there is none here") as error:
                move(device)
            assert "\n" not in str(error.value)
    assert {p.device.type for part in pipe.bundle.parts.values() for p in part.parameters()} == {"cpu"}
    assert len(pipe(labels=0, num_inference_steps=2, seed=0).images) == 1


def test_an_offloaded_text_encoder_is_on_the_device_only_while_it_encodes(tmp_path, monkeypatch):
    write_text_encoder(tmp_path / "umt5")
    trained = [it for it in TEXTS.split() if not it.startswith("text_encoder.")]
    pipe = GRNPipeline.from_pretrained(write_run(tmp_path / "run", " ".join([*trained, *frozen(tmp_path)])))
    asked = {"seed": 2, "num_inference_steps": 2, "output_type": "latent", "negative_prompt": "a two"}
    before = pipe(PROMPTS[0], **asked).tokens
    encoder, moves, encoded = pipe.bundle.frozen_encoder, [], []
    monkeypatch.setattr(encoder, "to", lambda device: moves.append(str(device)))
    encoder.register_forward_pre_hook(lambda *_: encoded.append(len(moves)))
    pipe.enable_model_cpu_offload("cpu")
    assert pipe.bundle.frozen_encoder is encoder
    assert not moves  # it stays where it is till somebody asks for samples
    assert torch.equal(pipe(PROMPTS[0], **asked).tokens, before)
    assert len(moves) == 2
    assert encoded
    assert set(encoded) == {1}  # between the two moves


def test_it_says_what_it_is(classes, videos):
    said = repr(GRNPipeline.from_pretrained(classes))
    assert said.startswith("GRNPipeline(a refiner of 5 classes, 0.")
    assert "16x16, 3 tokens of 4 values a position, Sampler(" in said
    assert said.endswith("on cpu)")
    said = repr(GRNPipeline.from_pretrained(videos))
    assert "a refiner of texts" in said
    assert "16x32, 5 frames" in said


def test_outputs(classes):
    pipe, asked = GRNPipeline.from_pretrained(classes), {"labels": [2, 0], "seed": 1}
    pictures, pixels, tokens = (pipe(output_type=output, **asked) for output in ("pil", "pt", "latent"))
    assert pixels.images.shape == (2, 3, 16, 16)
    assert pixels.images.dtype == torch.uint8
    assert np.array_equal(np.asarray(pictures.images[1]), pixels.images[1].permute(1, 2, 0))
    array = pipe(output_type="np", **asked).images
    assert (array.shape, array.dtype) == ((2, 16, 16, 3), np.float32)
    assert np.allclose(array[1] * 255, np.asarray(pictures.images[1]), atol=1e-4)
    assert tokens.images is None
    assert torch.equal(tokens.tokens, pixels.tokens)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_callback_sees_every_step_of_every_image(classes, batch_size):
    pipe, seen, times = GRNPipeline.from_pretrained(classes), {}, []

    def watch(pipeline, number, t, kwargs):
        assert (pipeline, number) == (pipe, len(times))
        step = kwargs["step"]
        times.append(t)
        assert t == step.t_next.max()
        for row, predicted, t in zip(step.rows.tolist(), step.predicted, step.t_next.tolist()):
            seen.setdefault(row, []).append((t, predicted))

    result = pipe(labels=[3, 1, 4], num_images_per_prompt=2, seed=5, callback_on_step_end=watch, batch_size=batch_size)
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
        pipe.set_progress_bar_config(disable=not shown)
        pipe(labels=[3, 1, 4], batch_size=2, seed=5)
        assert {disabled for disabled, _, _ in bars} == {not shown}
        assert [come for _, come, _ in bars] == sorted(come for _, come, _ in bars)
        assert bars[-1][1:] == (3, 3)


def test_which_steps(classes):
    pipe = GRNPipeline.from_pretrained(classes)

    def taken(steps):
        return pipe(labels=[0, 1], seed=1, num_inference_steps=steps, output_type="latent").steps.tolist()

    assert taken(3) == [3, 3]
    assert taken(Cosine(4)) == taken(Linear(4)) == [4, 4]
    assert taken("entropy") == taken(None)
    pipe.bundle.sampler = pipe._sampler(Cosine(5))
    assert taken(None) == [5, 5]
    assert pipe._sampler(6).schedule == Cosine(6)
    assert pipe._sampler("entropy").schedule == EntropyGuided(grid="cosine")
    pipe.bundle.sampler = Sampler(EntropyGuided(grid="shifted", alpha=2.0, cap=0.95))
    assert pipe._sampler(6).schedule == Shifted(6, alpha=2.0, cap=0.95)


@pytest.mark.parametrize("kind", ["classes", "texts"])
def test_from_an_image(kind, request, tmp_path):
    pipe = GRNPipeline.from_pretrained(request.getfixturevalue(kind))
    asked = {"labels": [1, 2]} if kind == "classes" else {"prompt": PROMPTS[:2], "height": 16, "width": 16}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 54, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, 27, 40))
    pipe_of = {"seed": 3, "output_type": "latent"} | asked
    found = pipe(image=image, mask_image=mask, **pipe_of).tokens
    given = start_from_image(pipe.bundle, tmp_path / "image.png", shape=tuple(found.shape[1:])).tokens
    assert torch.equal(found[..., 2:], given.expand_as(found)[..., 2:])
    assert (found != given)[..., :2].any()
    from_file = pipe(image=tmp_path / "image.png", strength=0.5, **pipe_of)
    assert torch.equal(pipe(image=image.convert("RGBA"), strength=0.5, **pipe_of).tokens, from_file.tokens)
    assert (from_file.steps < pipe(**pipe_of, num_inference_steps=Linear(8)).steps).all()


@pytest.mark.parametrize("kind", ["classes", "texts"])
def test_there_and_back(kind, request, tmp_path):
    run = request.getfixturevalue(kind)
    asked = {"labels": [1, 2]} if kind == "classes" else {"prompt": PROMPTS}
    pipe = GRNPipeline.from_pretrained(run)
    folder = pipe.save_pretrained(tmp_path / "saved")
    again = GRNPipeline.from_pretrained(folder)
    first, second = (it(seed=4, **asked) for it in (pipe, again))
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
        assert GRNPipeline.from_pretrained(name).bundle.size == (16, 32)
    assert files(tmp_path / "hub") == files(folder)
    asked.clear()
    options = {"revision": "v1", "cache_dir": tmp_path / "cache", "token": "secret", "local_files_only": True}
    pipe = GRNPipeline.from_pretrained("grn-tests/digits", torch_dtype=torch.bfloat16, **options)
    assert {parameter.dtype for parameter in pipe.bundle.network.parameters()} == {torch.bfloat16}
    assert asked
    assert all(given == options for given in asked)


@pytest.mark.parametrize("kind", ["classes", "texts"])
def test_another_precision(kind, request):
    pipe = GRNPipeline.from_pretrained(request.getfixturevalue(kind))
    asked = {"labels": [1, 2]} if kind == "classes" else {"prompt": PROMPTS[:2]}
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert pipe.to(torch.bfloat16).device == torch.device("cpu")
    assert {parameter.dtype for parameter in pipe.bundle.network.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in pipe.bundle.tokenizer.parameters()} == {torch.float32}
    half = pipe(seed=4, **asked)
    assert half.entropy.dtype == torch.float32
    assert (pipe.to(torch.float32)(seed=4, **asked).entropy - half.entropy).abs().max() < 0.1


@pytest.mark.parametrize(
    ("kind", "asked", "complaint"),
    [
        ("classes", {}, r"^labels=\[\]: labels of this checkpoint are 0\.\.4"),
        ("classes", {"labels": [0, 5]}, r"^labels=\[0, 5\]: labels of this checkpoint"),
        ("classes", {"labels": 2.5}, r"^labels=\[2\.5\]: labels of this checkpoint"),
        ("classes", {"labels": ["one"]}, r"^labels=\['one'\]: labels of this checkpoint"),
        ("classes", {"labels": [True]}, r"^labels=\[True\]: labels of this checkpoint"),
        ("classes", {"prompt": "a seven"}, "^prompt is for refiners of texts, .* give labels="),
        ("classes", {"labels": 0, "height": 16}, "^height is for refiners of texts"),
        ("texts", {}, "^prompt=None: a text, or a list"),
        ("texts", {"prompt": ["a", 3]}, r"^prompt=\['a', 3\]: a text, or a list"),
        ("texts", {"prompt": 3}, "^prompt=3: a text, or a list"),
        ("texts", {"labels": 3}, "^labels=3 are for refiners of classes, .* give a prompt"),
        ("texts", {"prompt": "a", "negative_prompt": ["a"]}, r"^negative_prompt=\['a'\]: one text"),
        ("texts", {"prompt": "a", "width": 18}, r"multiples of the tokenizer's stride 4, got \(16, 18\)"),
        ("texts", {"prompt": "a", "height": 16.0}, r"^height=16\.0: a whole number of pixels"),
        ("classes", {"labels": 0, "num_inference_steps": "many"}, "^num_inference_steps=many: a whole number, "),
        ("classes", {"labels": 0, "num_inference_steps": 0}, r"^sampler\.schedule\.steps must be at least 1, got 0"),
        ("classes", {"labels": 0, "guidance_scale": "much"}, "^guidance_scale=much: a number"),
        ("classes", {"labels": 0, "temperature": 0}, r"^sampler\.temperature must be positive, got 0"),
        (
            "classes",
            {"labels": 0, "guidance_interval": 0.5},
            r"guidance_interval must be two numbers, \[low, high\], got 0\.5",
        ),
        ("classes", {"labels": 0, "seed": 1, "generator": torch.Generator()}, "^seed=1: give it or a generator"),
        ("classes", {"labels": 0, "seed": 1.5}, r"^seed=1\.5: a whole number"),
        (
            "classes",
            {"labels": 0, "generator": [torch.Generator()] * 2},
            "^generator: give one, or a list of one for each of 1 images",
        ),
        ("classes", {"labels": 0, "num_images_per_prompt": 0}, "^num_images_per_prompt=0 must be a whole number"),
        ("classes", {"labels": 0, "batch_size": 0}, "^batch_size=0 must be a whole number, at least 1"),
        ("classes", {"labels": 0, "output_type": "jpg"}, "^output_type=jpg: choose among pil, pt, np, latent"),
        ("classes", {"labels": 0, "image": torch.zeros(3, 9, 9)}, "^image: the path of an image, .* not Tensor"),
        ("classes", {"labels": 0, "image": np.zeros((9, 9, 3))}, "^image: the path of an image, .* not ndarray"),
        ("classes", {"labels": 0, "image": b"x.png"}, "^image: the path of an image, .* not bytes"),
        ("classes", {"labels": 0, "image": [5]}, "^image: several pictures are for clips"),
        (
            "classes",
            {"labels": 0, "image": PICTURE, "mask_image": True},
            "^mask_image: the path of an image, .* not bool",
        ),
        ("videos", {"prompt": "a", "image": torch.zeros(3, 9, 9)}, "^image: the path of an image, .* not Tensor"),
        ("videos", {"prompt": "a", "image": b"x.mp4"}, "^image: the path of an image, .* not bytes"),
        ("videos", {"prompt": "a", "image": [5]}, "^image: the path of an image, .* not int"),
        ("videos", {"prompt": "a", "image": [PICTURE] * 2, "num_frames": 1}, "^image: several pictures are for clips"),
        ("classes", {"labels": 0, "strength": 0.5}, r"^strength=0\.5 .*give image="),
        (
            "classes",
            {"labels": 0, "image": PICTURE, "mask_image": Image.new("L", (8, 8))},
            "is 8x8, but image=.* is 9x9",
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
