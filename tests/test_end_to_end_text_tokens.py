"""As a user runs it: captioned shards are encoded with text features, and a text refiner trains from them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "data"))
from text_shards import frozen, of, write_images, write_text_encoder, write_tokenizer

pytestmark = pytest.mark.slow

REFINER = ["model=text_refiner_tiny", "model.depth=1", "model.width=24", "model.heads=2", "model.channels=6"]
REFINER += ["model.classes=2", "model.text_width=16", "model.mlp_ratio=11", "training=text_refiner", "logger=csv"]
REFINER += ["training.prompts=[a picture]", "training.size=[32,32]", "trainer.max_steps=4", "callbacks.grid.num=2"]
REFINER += ["trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "sampler.schedule.steps=3"]
REFINER += ["callbacks.last.every_n_train_steps=2", "cluster=cpu"]


def grn(folder, verb, *arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "GRN_RUNS": str(folder / "runs")}
    command = [sys.executable, "-m", f"grn.{verb}", *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_from_tokens_and_features_has_the_curve_of_one_from_pixels(tmp_path):
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images")
    write_tokenizer(tmp_path / "tokenizer")
    write_text_encoder(tmp_path / "umt5")
    from_pixels = of(data="text_image", root=tmp_path / "images", caption_dropout=0.3)
    from_tokens = of(data="text_tokens", root=tmp_path / "tokens", caption_dropout=0.3)
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
