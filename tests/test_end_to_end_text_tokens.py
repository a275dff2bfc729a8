"""As a user runs it: captioned shards are encoded with text features, and a text refiner trains from them."""

import csv
import os
from pathlib import Path

import commands
import pytest
import torch
from safetensors.torch import load_file
from text_shards import frozen, of, write_images, write_text_encoder, write_tokenizer

from grn.checkpoints.native import read_checkpoint
from grn.networks.adapters import adapter_state
from grn.networks.text_refiner import TextRefiner

pytestmark = pytest.mark.slow

REFINER = ["model=text_refiner_tiny", "model.depth=1", "model.width=24", "model.heads=2", "model.channels=6"]
REFINER += ["model.classes=2", "model.text_width=16", "model.mlp_ratio=11", "training=text_refiner", "logger=csv"]
REFINER += ["training.prompts=[a picture]", "training.size=[32,32]", "trainer.max_steps=4", "callbacks.grid.num=2"]
REFINER += ["trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "sampler.schedule.steps=3"]
REFINER += ["callbacks.last.every_n_train_steps=2", "cluster=cpu"]


def grn(folder, verb, *arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "GRN_RUNS": str(folder / "runs")}
    done = commands.run(f"grn.{verb}", *arguments, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_from_tokens_and_features_has_the_curve_of_one_from_pixels(tmp_path):
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images")
    write_tokenizer(tmp_path / "tokenizer")
    write_text_encoder(tmp_path / "umt5")
    from_pixels = of(data="captioned_image", root=tmp_path / "images", caption_dropout=0.3)
    from_tokens = of(data="captioned_tokens", root=tmp_path / "tokens", caption_dropout=0.3)
    from_tokens[from_tokens.index("data.num_workers=0")] = "data.num_workers=1"
    out = ["ckpt=tokenizer", f"out={tmp_path}/tokens"]
    grn(tmp_path, "encode", *out, *from_pixels, *frozen(tmp_path))
    curves = {}
    for name, data in {"pixels": from_pixels, "tokens": from_tokens}.items():
        grn(tmp_path, "train", "tokenizer.ckpt=tokenizer", f"name={name}", *REFINER, *frozen(tmp_path), *data)
        (path,) = (tmp_path / "runs" / name / "csv").rglob("metrics.csv")
        with open(path) as file:
            rows = list(csv.DictReader(file))
        curves[name] = {
            curve: [float(row[curve]) for row in rows if row[curve]] for curve in ("train/loss", "val/loss")
        }
        assert [len(curve) for curve in curves[name].values()] == [4, 2]
        assert (tmp_path / "runs" / name / "pictures" / "samples-step0000004.png").is_file()
    for curve, values in curves["pixels"].items():
        assert curves["tokens"][curve] == pytest.approx(values, abs=1e-5)


def test_fine_tuning_trains_adapters_alone_and_goes_on(tmp_path):
    """From weights of a folder, as finetune_t2i does; the run is sampled, and its adapters are exported."""
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images")
    write_tokenizer(tmp_path / "tokenizer")
    write_text_encoder(tmp_path / "umt5")
    sizes = {"channels": 6, "classes": 2, "depth": 1, "width": 24, "heads": 2, "text_width": 16, "max_text": 512}
    torch.manual_seed(0)
    base = TextRefiner(**sizes, mlp_ratio=11, attention="full")
    base.save_pretrained(tmp_path / "base")
    data = of(data="captioned_image", root=tmp_path / "images")
    arguments = ["tokenizer.ckpt=tokenizer", "name=lora", *REFINER, *frozen(tmp_path), *data, "model.weights=base"]
    arguments += ["training.adapters={rank:2,alpha:2}", "cluster.activation_checkpointing=full"]
    arguments += ["training.learning_rate=0.1"]
    grn(tmp_path, "train", *[it.replace("max_steps=4", "max_steps=2") for it in arguments])
    grn(tmp_path, "train", *arguments, "ckpt_path=last")
    checkpoint = read_checkpoint(tmp_path / "runs" / "lora")
    state, averaged = checkpoint.weights("none"), checkpoint.weights()
    assert checkpoint.step == 4
    for name, tensor in base.state_dict().items():
        kept = (
            f"refiner.{name}"
            if f"refiner.{name}" in state
            else f"refiner.{name.removesuffix('weight')}base_layer.weight"
        )
        assert torch.equal(state[kept], tensor), name
    ups = [name for name in state if "lora_B" in name]
    assert len(ups) == 7
    assert all(state[name].abs().max() > 0.01 and not torch.equal(state[name], averaged[name]) for name in ups)
    grn(tmp_path, "sample", "ckpt=runs/lora", "prompts=[a picture]", "num=1", "film=false", "device=cpu")
    grn(tmp_path, "export", "ckpt=runs/lora", "format=adapters", "out=style", "ema=none")
    assert load_file(tmp_path / "style.safetensors").keys() == adapter_state(state).keys()
