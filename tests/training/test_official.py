"""The authors' weights by task: tiny files of their names, layouts and keys, in a folder and on a hub of our own."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from transformers import T5Tokenizer

import grn
from grn.checkpoints import official_tokenizer
from grn.checkpoints.official_class_refiner import save_official_class_refiner
from grn.checkpoints.official_text_refiner import save_official_text_refiner
from grn.cli.checks import check_given
from grn.evaluation.evaluate import evaluate
from grn.method.sampler import Sampler
from grn.method.schedules import Linear, Shifted
from grn.networks.class_refiner import ClassRefiner
from grn.networks.text_refiner import TextRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.sampling.loading import load_refiner
from grn.sampling.official import load_official_refiner
from grn.sampling.pipeline import GRNPipeline
from grn.sampling.sample import sample
from grn.training import building
from grn.weights import pretrained, releases
from grn.weights.releases import RELEASES, File

ROOT = Path(grn.__file__).parents[1]
HUB_ID = "bytedance-research/GRN"
TOKENIZER = {"latent_channels": 3, "rounds": 2, "dim": 8, "decoder_dim": 8, "multipliers": (1, 2)}
TOKENIZER |= {"blocks_per_stage": 1, "temporal": (True,)}
TEXT = {"channels": 6, "classes": 2, "depth": 2, "width": 24, "heads": 4, "kv_heads": None, "mlp_ratio": 11}
TEXT |= {"text_width": 24, "max_text": 512, "attention": "full"}
CLASSES = {"channels": 3, "classes": 4, "num_labels": 5, "size": 4, "depth": 2, "width": 32, "heads": 2}
CLASSES |= {"bottleneck": 8, "context_start": 1, "context_tokens": 2, "mlp_ratio": 4.0}
# Both definitions of 8B in small: the second has fewer key and value heads and a wider MLP.
MODELS = {"2B": (TEXT,), "8B": (TEXT, TEXT | {"kv_heads": 2, "mlp_ratio": 22}), "B": (CLASSES,), "L": (CLASSES,)}


def small(release, size):
    small = {"models": MODELS.get(size, (CLASSES,)), "tokenizer_model": TOKENIZER, "size": (16, 32)}
    return dataclasses.replace(release, **small, frames=min(release.frames, 5))


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """The table, of networks as small as the files."""
    known = {(task, size): small(release, size) for (task, size), release in RELEASES.items()}
    monkeypatch.setattr(releases, "RELEASES", known)
    return known


def random_weights(network, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The files of t2i, t2v, 8B (of the second definition) and c2i B, and others that nobody asks for."""
    folder = tmp_path_factory.mktemp("authors")
    nested = folder / "umt5-xxl" / "umt5-xxl"
    nested.mkdir(parents=True)
    text, eight = TextRefiner(**TEXT), TextRefiner(**MODELS["8B"][1])
    for seed, (network, name) in enumerate(
        (
            (text, "GRN_T2I_2B_FSA_251600"),
            (text, "GRN_T2V_2B_FSA_sft147400_ema"),
            (eight, "GRN_T2V_TITAN_FSA_sft10600_ema"),
        )
    ):
        save_official_text_refiner(random_weights(network, seed).state_dict(), folder / f"{name}.pth", chunks=2)
    classes = random_weights(ClassRefiner(**CLASSES), 3)
    state = classes.state_dict()
    averages = {"0.9999": state, "0.9996": {name: 2 * tensor for name, tensor in state.items()}}
    save_official_class_refiner(state, averages, classes.position, folder / "GRN_ind_B_ep599.pth")
    for seed, name in enumerate(("HBQ_image_tokenizer_16dim_M4", "HBQ_image_video_tokenizer_64dim_M4_20260626")):
        tokenizer = random_weights(HBQTokenizer(**TOKENIZER), 10 + seed)
        official_tokenizer.save_official_tokenizer(tokenizer.state_dict(), folder / f"{name}.ckpt")
    encoder = {"token_embedding.weight": (32, 24), "norm.weight": (24,), "blocks.0.norm1.weight": (24,)}
    encoder |= {"blocks.0.norm2.weight": (24,), "blocks.0.pos_embedding.embedding.weight": (32, 4)}
    encoder |= {f"blocks.0.attn.{name}.weight": (16, 24) for name in "qkv"} | {"blocks.0.attn.o.weight": (24, 16)}
    encoder |= {f"blocks.0.ffn.{name}.weight": (32, 24) for name in ("gate.0", "fc1")}
    encoder |= {"blocks.0.ffn.fc2.weight": (24, 32)}
    generator = torch.Generator().manual_seed(20)
    encoder = {name: torch.randn(shape, generator=generator) for name, shape in encoder.items()}
    torch.save(encoder, folder / "umt5-xxl" / "models_t5_umt5-xxl-enc-bf16.pth")
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    T5Tokenizer([(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0).save_pretrained(nested)
    (folder / "README.md").write_text("not asked for")
    return folder


def downloaded(weights, cache):
    """What a process with HF_ENDPOINT downloads of t2i from a hub of our own: the files that it was sent."""
    lines = "from grn.weights.pretrained import fetch; from grn.weights.releases import find_release\n"
    lines += f"fetch('hf://{HUB_ID}', files=find_release('t2i')[1].files)"
    with hub_server.serving({HUB_ID: weights}) as (endpoint, sent):
        own = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}
        subprocess.run([sys.executable, "-c", lines], cwd=ROOT, env=os.environ | own, check=True, timeout=300)
        return sent


def composed(name, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, [str(override) for override in overrides])


def complaint(call):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_table_is_that_of_the_configs():
    """Of architectures and sampling settings, which are in conf/ for training."""
    options = {"2B": ["text_refiner_2B"], "8B": ["text_refiner_8B", "text_refiner_8B_grouped"]}
    options |= {size: [f"class_refiner_{size}"] for size in "BLH"}
    for (task, size), release in RELEASES.items():
        kind = TextRefiner if release.encoder else ClassRefiner
        for option, model in zip(options[size], release.models, strict=True):
            config = composed("export", f"model={option}", "ckpt=x", "out=x").model
            assert {name: config[name] for name in model} == model
            with torch.device("meta"):
                kind(**model)
        option = "official_joint" if release.encoder else "official_image"
        config = composed("export", f"tokenizer={option}", "ckpt=x", "out=x").tokenizer.model
        assert {name: config[name] for name in release.tokenizer_model} == {
            name: list(value) if isinstance(value, tuple) else value for name, value in release.tokenizer_model.items()
        }
        assert all(file for file in release.files)
        own = {("t2i", "2B"): "t2i_2B", ("t2v", "2B"): "t2v_2B"}.get((task, size), f"c2i_ind_{size}")
        if size != "8B":
            sampler = composed("train", f"+experiment={own}").sampler
            assert sampler.guidance == release.sampler["guidance"]
            assert (sampler.temperature or 1.0) == release.sampler["temperature"]


def test_text_to_image_from_the_hub(weights, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert sorted(downloaded(weights, tmp_path)) == sorted(
        f"{HUB_ID}/{path}"
        for path in (
            "GRN_T2I_2B_FSA_251600.pth",
            "HBQ_image_video_tokenizer_64dim_M4_20260626.ckpt",
            "umt5-xxl/models_t5_umt5-xxl-enc-bf16.pth",
            *(path.relative_to(weights).as_posix() for path in (weights / "umt5-xxl" / "umt5-xxl").iterdir()),
        )
    )
    cached = {"cache_dir": tmp_path, "local_files_only": True}
    pipe = GRNPipeline.from_pretrained(HUB_ID, task="t2i", size="2B", **cached)
    module = pipe.bundle
    assert module.sampler == Sampler(Shifted(50, cap=0.95), temperature=1.1, guidance=3.0)
    assert (module.refiner.attention, module.labeling, module.negative_prompt) == ("full", "bit", "")
    assert (module.size, module.frames, module.worded("a dog")) == ((16, 32), 1, "<T2I>a dog")
    assert module.text_encoder.clean_captions
    (line,) = (record.getMessage() for record in caplog.records if record.name == "grn.sampling.official")
    for told in ("t2i size=2B", "GRN_T2I_2B_FSA_251600.pth", "cap=0.95", "temperature=1.1", "<T2I>prompt"):
        assert told in line
    result = pipe("a dog", num_inference_steps=2, seed=1)
    assert result.images[0].size == (32, 16)
    again = GRNPipeline.from_pretrained(HUB_ID, task="t2i", **cached)  # the first size
    assert torch.equal(again("a dog", num_inference_steps=2, seed=1, output_type="latent").tokens, result.tokens)


def test_single_files_of_the_hub(weights, tmp_path, monkeypatch):
    """`model.weights` and `tokenizer.ckpt` of a fine-tuning: files in the repository, by their paths in it."""
    names = ("GRN_T2I_2B_FSA_251600.pth", "umt5-xxl/models_t5_umt5-xxl-enc-bf16.pth", "gone.pth")
    lines = "from grn.runtime.errors import UserError; from grn.weights.pretrained import local_file\n"
    lines += f"for name in {names}:\n"
    lines += f"    try: print(local_file(f'hf://{HUB_ID}/{{name}}'))\n    except UserError as error: print(error)\n"
    with hub_server.serving({HUB_ID: weights}) as (endpoint, sent):
        own = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", lines]
        run = subprocess.run(command, cwd=ROOT, env=os.environ | own, check=True, timeout=300, capture_output=True)
    first, second, third = run.stdout.decode().splitlines()
    assert sorted(sent) == [f"{HUB_ID}/{name}" for name in names[:2]]
    assert Path(first).read_bytes() == (weights / names[0]).read_bytes()
    assert Path(second).read_bytes() == (weights / names[1]).read_bytes()
    assert third == f"hf://{HUB_ID}/gone.pth: the repository {HUB_ID} has no such file"

    fetched = []
    monkeypatch.setattr(pretrained, "fetch", lambda place, files: fetched.append((place, *files)) or weights)
    network = TextRefiner(**TEXT)
    state, averages = building._initial_weights(network, f"hf://{HUB_ID}/{names[0]}")
    network.load_state_dict(state)
    assert averages == {}
    assert fetched == [(f"hf://{HUB_ID}", names[0])]


def test_a_folder_and_its_export(weights, tmp_path):
    """A local folder or mirror serves; what save_pretrained writes draws the same, prompts' words included."""
    pipe = GRNPipeline.from_pretrained(weights, task="t2v")
    assert pipe.bundle.worded("a dog") == "<T2V>a dog. The quality is very high!"
    assert pipe.bundle.worded("") == ""
    assert pipe.bundle.negative_prompt == releases.NEGATIVE_PROMPT
    assert pipe.bundle.frames == 5
    drawn = {"num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    tokens = pipe("a dog", **drawn).tokens
    assert tokens.shape == (1, 6, 3, 4, 8)
    again = GRNPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "export"))
    assert again.bundle.worded("a dog") == "<T2V>a dog. The quality is very high!"
    assert torch.equal(again("a dog", **drawn).tokens, tokens)
    again.bundle.prompt_prefix = again.bundle.prompt_suffix = ""
    assert not torch.equal(again("a dog", **drawn).tokens, tokens)


def test_image_to_video(weights, tmp_path):
    """Of the 8B file, whose definition its shapes tell; the given frame stays, brought to size by Lanczos."""
    pipe = GRNPipeline.from_pretrained(weights, task="i2v")
    assert (pipe.bundle.refiner.config["kv_heads"], pipe.bundle.context_latents) == (2, 1)
    assert pipe.bundle.worded("a dog") == "<I2V>a dog high aesthetic and high quality video."
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    drawn = {"num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    tokens = pipe("a dog", image=picture, **drawn).tokens
    fitted = picture.resize((32, 41), Image.Resampling.LANCZOS).crop((0, 12, 32, 28))
    pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None, :, None]
    first = pipe.bundle.tokenize(pixels)[0]
    assert torch.equal(tokens[0][:, :1], first)
    assert complaint(lambda: pipe("a dog", **drawn)).startswith("image: these weights make clips of a first frame")
    again = GRNPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "export"))
    assert torch.equal(again("a dog", image=picture, **drawn).tokens, tokens)
    assert "give image" in complaint(lambda: again("a dog", **drawn))
    assert pipe.bundle.provenance["refiner"]["source"] == f"{weights}/GRN_T2V_TITAN_FSA_sft10600_ema.pth"


def test_classes(weights):
    module, source = load_official_refiner(str(weights), task="c2i")
    assert module.sampler == Sampler(Linear(50), temperature=1.31, guidance=2.35, guidance_interval=(0.44, 1.0))
    assert (source["task"], source["size"]) == ("c2i", "B")
    assert source["files"] == ["GRN_ind_B_ep599.pth", "HBQ_image_tokenizer_16dim_M4.ckpt"]
    assert GRNPipeline.from_pretrained(weights, task="c2i", ema="0.9996")(labels=[1], num_inference_steps=1).images
    assert "ema=0.5 is not in" in complaint(lambda: load_official_refiner(str(weights), task="c2i", ema=0.5))


def test_the_command(weights, tmp_path):
    config = composed("sample", f"ckpt={weights}", "task=t2i", "prompts=[a dog]", "num=1", f"out={tmp_path / 'out'}")
    config.sampler = composed("sample", "ckpt=x", "sampler=shifted", "sampler.schedule.steps=2").sampler
    config.update({"device": "cpu", "html": True, "film": False})
    check_given(config)
    out = sample(config)
    report = json.loads((out / "samples.json").read_text())
    assert (report["task"], report["size"], report["prompts"]) == ("t2i", "2B", ["a dog"])
    assert "cap=0.95" in report["sampler"]
    assert "temperature=1.1" in report["sampler"]
    assert f"ckpt={weights} " in (page := (out / "refinement.html").read_text())
    assert "task=t2i" in page


def test_an_evaluation(weights, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "a.txt").write_text("a dog")
    given = [f"ckpt={weights}", "task=t2i", "suite=dpg_bench", f"suite.prompts={tmp_path / 'prompts'}", "wandb=false"]
    given += ["sampler=shifted", "sampler.schedule.steps=2", "device=cpu", f"out={tmp_path / 'out'}"]
    config = composed("evaluate", *given)
    check_given(config)
    evaluate(config)
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (report["task"], report["size"], report["num"]) == ("t2i", "2B", 4)
    assert report["settings"]["task"] == "t2i"
    assert report["settings"]["sampler"]["schedule"]["cap"] == 0.95
    unknown = composed("evaluate", f"ckpt={weights}", "task=t2i", f"out={tmp_path / 'other'}", "device=cpu")
    assert "does not know its data: give data=... and scores=..." in complaint(lambda: evaluate(unknown))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["task=t2x"], "task=t2x: choose among t2i, t2v, i2v, c2i"),
        (["task=t2i", "model_size=9B"], "model_size=9B: of task=t2i the authors' weights have 2B, 8B"),
        (["model_size=2B"], "model_size=2B is of the authors' weights: give task=..., too"),
        ([], "has the authors' weights of several tasks: give one of task=t2i, task=t2v, task=i2v, task=c2i"),
        (["ckpt=hf://bytedance-research/GRN"], "has the authors' weights of several tasks"),
        (["ckpt=nowhere", "task=t2i"], "ckpt: no folder nowhere; task=t2i takes the authors' repository"),
    ],
)
def test_mistakes_of_the_command(weights, overrides, expected):
    config = composed("sample", f"ckpt={weights}" if "ckpt" not in str(overrides) else overrides[0], *overrides)
    assert expected in complaint(lambda: check_given(config))
    config = composed("evaluate", f"ckpt={weights}" if "ckpt" not in str(overrides) else overrides[0], *overrides)
    assert expected in complaint(lambda: check_given(config))


def test_mistakes(weights, table, tmp_path, monkeypatch):
    def load(folder=weights, task="t2i", **options):
        return complaint(lambda: GRNPipeline.from_pretrained(folder, task=task, **options))

    assert "has the authors' weights of several tasks: give one of task=t2i" in load(task=None)
    assert "of task=t2i the authors' weights have 2B, 8B" in load(size="L")
    assert 'give task="t2i", too' in load(task=None, size="2B")
    assert "task=c2i needs a file GRN_ind_L_ep599.pth, and" in load(task="c2i", size="L")
    assert "several tasks" in complaint(lambda: load_refiner(str(weights)))
    assert "ema=0.999: " in load(ema=0.999)

    file = dataclasses.replace(table["t2i", "2B"].refiner, sha256="0" * 64)
    known = {**table, ("t2i", "2B"): dataclasses.replace(table["t2i", "2B"], refiner=file)}
    monkeypatch.setattr(releases, "RELEASES", known)
    assert "not 0000" in load()
    monkeypatch.setattr(releases, "RELEASES", table)

    copy = shutil.copytree(weights, tmp_path / "copy")
    wide = random_weights(TextRefiner(**(TEXT | {"width": 32})), 0)
    save_official_text_refiner(wide.state_dict(), copy / "GRN_T2I_2B_FSA_251600.pth", chunks=2)
    assert "download it again" in load(copy)
    (copy / "GRN_T2I_2B_FSA_251600.pth").write_bytes(b"<html>")
    assert "GRN_T2I_2B_FSA_251600.pth cannot be read as a checkpoint" in load(copy)
    (copy / "model_index.json").write_text("{}")
    assert "is an export: leave task out" in load(copy)


def test_a_pattern_must_find_one_file(weights, table, tmp_path, monkeypatch):
    copy = shutil.copytree(weights, tmp_path / "copy")
    shutil.copy(copy / "GRN_ind_B_ep599.pth", copy / "GRN_ind_H_ep399.pth")
    _, source = load_official_refiner(str(copy), task="c2i", size="H")
    assert source["files"][0] == "GRN_ind_H_ep399.pth"
    shutil.copy(copy / "GRN_ind_B_ep599.pth", copy / "GRN_ind_H_ep599.pth")
    message = complaint(lambda: load_official_refiner(str(copy), task="c2i", size="H"))
    assert message.endswith("has 2 of them")
    assert File("x").sha256 is None
