"""The public commands on one GPU, in real processes where they are killed: training, shards, sampling, the studio."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_end_to_end as commands_here
import test_pipeline
import torch
from on_device import DEVICE, ON_GPU

from grn.sampling.pipeline import GRNPipeline
from grn.web.engine import Engine
from grn.weights.kinds import is_checkpoint

pytestmark = [pytest.mark.cuda, pytest.mark.slow]

CLUSTER = " cluster=gpu" if ON_GPU else " cluster=cpu"
SHARDED = " cluster=fsdp cluster.devices=1" + ("" if ON_GPU else " cluster.accelerator=cpu")  # of one rank, by NCCL
TOKENIZER = commands_here.TOKENIZER + " logger=none"
REFINER = commands_here.REFINER + " logger=none"
EXACT = " scores=none +trainer.deterministic=warn trainer.max_steps=30 name="


@pytest.fixture(scope="module")
def workspace(built_once):
    """Prepared digits, a tokenizer trained on the device."""

    def build(folder):
        succeed(folder, "prepare", "data=digits")
        succeed(folder, "train", TOKENIZER + CLUSTER)

    return built_once("cuda", build)


def start(workspace, verb, arguments):
    """A new process and no fork of one: that could not use a GPU which the other has looked at."""
    environment = os.environ | {
        "GRN_DATA": str(workspace / "data"),
        "GRN_RUNS": str(workspace / "runs"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    command = [sys.executable, "-m", f"grn.{verb}", *commands_here.last_of_each(arguments)]
    with open(workspace / f"{verb}.log", "w") as log:
        return subprocess.Popen(command, cwd=workspace, env=environment, stdout=log, stderr=subprocess.STDOUT)


def succeed(workspace, verb, arguments):
    assert start(workspace, verb, arguments).wait(timeout=240) == 0, (workspace / f"{verb}.log").read_text()


def test_killed_and_resumed_ends_with_the_same_bits(workspace):
    command = REFINER + CLUSTER + EXACT
    succeed(workspace, "train", command + "whole")
    process, last = start(workspace, "train", command + "killed"), workspace / "runs/killed/checkpoints/last.ckpt"
    while not is_checkpoint(last):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert 0 < commands_here.checkpoint(workspace, "killed")["global_step"] < 30
    succeed(workspace, "train", command + "killed ckpt_path=last")
    whole, resumed = (commands_here.checkpoint(workspace, name) for name in ("whole", "killed"))
    commands_here.assert_same_bits(whole, resumed)
    assert all(weight.isfinite().all() for weight in whole["state_dict"].values())


def test_a_rank_with_shards_saves_goes_on_and_is_made_one_file(workspace, tmp_path):
    command = REFINER + SHARDED + " name=sharded scores=none"
    succeed(workspace, "train", command + " trainer.max_steps=6")
    last = workspace / "runs" / "sharded" / "checkpoints" / "last.ckpt"
    assert (last / "rest.pt").is_file()
    succeed(workspace, "train", command + " ckpt_path=last trainer.max_steps=12")
    succeed(workspace, "consolidate", f"ckpt={last} out={tmp_path}/whole.ckpt")
    whole = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert whole["global_step"] == 12
    assert list(commands_here.differences(whole, commands_here.checkpoint(workspace, "sharded"))) == []


@pytest.mark.parametrize("compiled", [False, True])
def test_a_text_refiner_trains_on_packs(workspace, compiled):
    if compiled and not ON_GPU:
        pytest.skip("a text refiner is compiled for GPUs alone")
    if not (workspace / "data" / "digits_t2i").exists():
        succeed(workspace, "prepare", "data=digits_t2i")
    arguments = "+experiment=digits_t2i model.depth=2 model.width=64 model.heads=2 model.mlp_ratio=6"
    arguments += " model.text_width=32 text_encoder.width=32 text_encoder.depth=1"
    arguments += " trainer.max_steps=6 trainer.val_check_interval=6"
    arguments += f" training.warmup_steps=2 scores=none logger=none callbacks.film=null name=text_{compiled}"
    arguments += " callbacks.grid.num=4 callbacks.last.every_n_train_steps=3" + CLUSTER
    if compiled:
        arguments += " cluster.compile=true cluster.activation_checkpointing=selective"
    succeed(workspace, "train", arguments)
    state = commands_here.checkpoint(workspace, f"text_{compiled}")["state_dict"]
    assert all(weight.isfinite().all() for weight in state.values())


def test_what_is_done_with_a_refiner(workspace, tmp_path, monkeypatch):
    """Encoded, trained from tokens, sampled, scored, exported."""
    if not (workspace / "runs" / "digits_c2i").exists():
        succeed(workspace, "train", REFINER + CLUSTER + " scores=none")

    def here(verb, arguments):
        commands_here.grn_here(workspace, monkeypatch, verb, arguments)

    device = f"device={DEVICE}"
    here("encode", f"ckpt=runs/digits_tokenizer data=digits {device}")
    here("sample", f"ckpt=runs/digits_c2i num=6 bf16={ON_GPU} {device} out={tmp_path}/samples")
    assert len(json.loads((tmp_path / "samples" / "samples.json").read_text())["steps"]) == 6
    here("evaluate", f"ckpt=runs/digits_c2i num=20 {device} scores=digits data.num_workers=0 out={tmp_path}/scores")
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())["metrics"]
    assert {"fid", "judge_accuracy"} <= scores.keys()
    here("export", f"ckpt=runs/digits_c2i out={tmp_path}/exported")
    pipe = GRNPipeline.from_pretrained(tmp_path / "exported").to(DEVICE)
    assert len(pipe(labels=[3, 1], num_inference_steps=3, seed=1).images) == 2
    shutil.rmtree(tmp_path / "exported")


@pytest.mark.parametrize("kind", ["CLASSES", "TEXTS"])
def test_the_studios_stream(kind, tmp_path):
    """Drawn step by step on the device, gone back in and drawn again: what the pipeline draws."""
    pipe = GRNPipeline.from_pretrained(test_pipeline.write_run(tmp_path, getattr(test_pipeline, kind))).to(DEVICE)
    asked = {"labels": [3, 1]} if kind == "CLASSES" else {"prompt": ["a seven", "a one"]}
    request = pipe.request(**asked, num_inference_steps=6, seed=5)
    (batch,) = pipe.sample(request)
    engine = Engine()
    try:
        drawing = engine.draw(pipe, request)
        for repeat in range(2):
            until = time.monotonic() + 60
            while not drawing.is_over:
                assert time.monotonic() < until, f"{drawing.state} after {drawing.steps} steps: {drawing.error}"
                time.sleep(0.01)
            assert drawing.error is None
            assert torch.equal(drawing.refined.tokens.cpu(), batch.refined.tokens.cpu())
            if repeat == 0:
                engine.change(drawing, 2).result(60)
    finally:
        engine.close()
