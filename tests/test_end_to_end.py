"""The public commands, as a user runs them: processes, real shards, a temporary folder; and what they leave."""

import csv
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import time
from importlib.metadata import version
from pathlib import Path

import commands
import pytest
import torch
from PIL import Image
from wandb_files import wandb_records

from grn import demo
from grn.checkpoints.sharded import read_sharded
from grn.media.mp4 import write_mp4
from grn.media.video import probe_video
from grn.weights.kinds import is_checkpoint

pytestmark = pytest.mark.slow
full = pytest.mark.full

VERBS = ("prepare", "train", "calibrate", "sample", "evaluate", "compare", "encode", "export", "consolidate", "bench")

TOKENIZER = (
    "+experiment=digits_tokenizer model.dim=8 model.decoder_dim=8 trainer.max_steps=12 trainer.val_check_interval=6"
)
TOKENIZER += " trainer.log_every_n_steps=3 training.warmup_steps=2 data.batch_size=20"
REFINER = "+experiment=digits_c2i model.depth=2 model.width=32 model.heads=2 model.bottleneck=16 model.context_start=1"
REFINER += " trainer.max_steps=12 trainer.val_check_interval=6 trainer.log_every_n_steps=3 training.warmup_steps=2"
REFINER += " callbacks.last.every_n_train_steps=3 callbacks.scores.num=20 callbacks.grid.num=10 data.batch_size=20"

FILMED, REFINER = REFINER, REFINER + " callbacks.film=null"  # a film takes longer than these steps
LATE = REFINER + " name=late logger=none"
NAN = " training.learning_rate=1e30 training.gradient_clip=null training.warmup_steps=0"


TWO_RANKS = " cluster=ddp cluster.accelerator=cpu cluster.devices=2 cluster.precision=32-true"
TWO_SHARDS = TWO_RANKS.replace("ddp", "fsdp")


def last_of_each(arguments):
    """What a test adds to a command replaces what was there: a command sets no key twice."""
    return list({argument.partition("=")[0].lstrip("+"): argument for argument in arguments.split()}.values())


def grn(workspace, verb, arguments, *, background=False, environment=None, processes=1, node=None):
    """Runs a command, as so many processes; `node`: as one of two nodes, (its number, a port to meet at)."""
    environment = (
        os.environ
        | (environment or {})
        | {
            "GRN_DATA": str(workspace / "data"),
            "GRN_RUNS": str(workspace / "runs"),
            "WANDB_MODE": "offline",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
    )
    launcher = ["torch.distributed.run", f"--nproc-per-node={processes}"]
    if node is None:
        launcher += ["--standalone"]
    else:
        launcher += ["--nnodes=2", f"--node-rank={node[0]}", "--master-addr=127.0.0.1", f"--master-port={node[1]}"]
    command = [*([*launcher, "-m"] if processes > 1 else []), f"grn.{verb}", *last_of_each(arguments)]
    return (commands.Command if background else commands.run)(*command, cwd=workspace, env=environment)


def succeed(workspace, verb, arguments, **keywords):
    done = grn(workspace, verb, arguments, **keywords)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def grn_here(workspace, monkeypatch, verb, arguments):
    """Runs a command in this process, which is sooner done."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("GRN_DATA", str(workspace / "data"))
    monkeypatch.setenv("GRN_RUNS", str(workspace / "runs"))
    monkeypatch.setattr(sys, "argv", [f"grn.{verb}", *last_of_each(arguments)])
    importlib.import_module(f"grn.{verb}").main()


def mistaken(workspace, monkeypatch, verb, arguments):
    """Runs a command, in this process, that must end with one clear line on stderr; returns that line."""
    with pytest.raises(SystemExit) as exit:
        grn_here(workspace, monkeypatch, verb, arguments)
    line = exit.value.code
    assert isinstance(line, str)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


@pytest.fixture(scope="module")
def workspace(built_once):
    """Prepared digits, a briefly trained tokenizer and refiner."""

    def build(folder):
        succeed(folder, "prepare", "data=digits")
        succeed(folder, "train", TOKENIZER)
        succeed(folder, "train", FILMED)

    return built_once("workspace", build)


@full
def test_mlflow_has_the_curves_and_the_config(workspace):
    """Where it is installed; it brings OpenTelemetry, by which W&B then starts threads in every process."""
    MlflowClient = pytest.importorskip("mlflow").MlflowClient
    succeed(workspace, "train", TOKENIZER + " name=tracked logger=[csv,mlflow]")
    client = MlflowClient(f"sqlite:///{workspace}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("tracked").experiment_id])
    assert run.info.run_name == "tracked"
    assert {"train/loss", "val/psnr"} <= run.data.metrics.keys()
    assert run.data.params["training/learning_rate"] == "0.004"


def test_run_folder_holds_everything(workspace):
    run = workspace / "runs" / "digits_c2i"
    assert "name: digits_c2i" in (run / "config.yaml").read_text()
    assert "${" not in (run / "config.yaml").read_text()
    assert "+experiment=digits_c2i" in (run / "command.txt").read_text()
    versions = json.loads((run / "versions.json").read_text())
    assert versions["torch"] == version("torch")
    assert {"git", "git_here"} <= versions.keys()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    pictures = {path.name for path in (run / "pictures").iterdir()}
    assert pictures == {"samples-step0000006.png", "samples-step0000012.png", "refinement.gif", "refinement.html"}
    assert not list(run.rglob("*.partial*"))


def test_curves_are_in_the_csv(workspace):
    (path,) = (workspace / "runs" / "digits_c2i" / "csv").rglob("metrics.csv")
    with open(path) as file:
        rows = list(csv.DictReader(file))
    seen = {key for row in rows for key, value in row.items() if value}
    assert {"train/loss", "train/lr", "train/grad_norm", "train/images_per_second", "train/accuracy/mean"} <= seen
    assert "train/tflops_per_second" in seen
    assert {"val/loss", "val/accuracy", "eval/fid", "eval/judge_accuracy", "eval/steps_mean", "data/skipped"} <= seen
    assert any(key.startswith("train/accuracy/t_0.") for key in seen)
    assert path.with_name("steps-step0000012.csv").read_text().startswith("class,steps,samples\n")


def test_curves_and_pictures_are_in_the_offline_wandb_run(workspace):
    (path,) = (workspace / "runs" / "digits_c2i" / "wandb").glob("offline-run-*/run-*.wandb")
    keys, config, artifacts = set(), set(), set()
    for record in wandb_records(path):
        artifacts.add(record.artifact.type)
        keys |= {"/".join(item.nested_key) or item.key for item in record.history.item}
        config |= {item.key for item in record.run.config.update} | {item.key for item in record.config.update}
    assert {"train/loss", "train/images_per_second", "val/loss", "eval/fid"} <= keys
    media = {key.rsplit("/", 1)[0] for key in keys}  # of sample/grid/_type, ...
    assert media >= {"sample/grid", "sample/film", "eval/steps", "eval/steps_by_class"}
    assert "sample/grid/captions" in keys
    assert {"model", "training", "data"} <= config
    assert {"code", "config"} <= artifacts


def test_the_dashboard_shows_what_runs_log(workspace):
    """Every plot's curves are some run's, by the names that it has in the CSV."""
    pytest.importorskip("wandb_workspaces", reason="pip install 'grn[dashboard]'")
    dashboard = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "dashboard" / "workspace.py"))
    seen = set()
    for run in ("digits_c2i", "digits_tokenizer"):
        (path,) = (workspace / "runs" / run / "csv").rglob("metrics.csv")
        seen |= {key for row in rows_of(path) for key, value in row.items() if value}
    shown = {curve for plots in dashboard["PLOTS"].values() for _, curves in plots for curve in curves}
    elsewhere = {"train/mfu", "train/lpips", "train/gan", "train/discriminator"}  # GPUs; losses that digits lack
    assert {curve for curve in shown - elsewhere if not curve.startswith("train/accuracy/t_")} <= seen
    spec = dashboard["workspace"]("me", "grn")._to_model().model_dump_json(by_alias=True)
    assert all(f'"{curve}"' in spec for curve in shown)


def short_demo(folder):
    os.chdir(folder)
    refiner = "ckpt=runs/digits_c2i"
    given = [("data=digits",), TOKENIZER.split(), REFINER.split(), (refiner, "num=6"), None, (refiner, "num=20")]
    demo.STAGES = [stage._replace(arguments=own or stage.arguments) for stage, own in zip(demo.STAGES, given)]
    sys.argv = ["demo"]
    demo.main()


@full
def test_the_demo_is_its_commands(workspace, tmp_path):
    """In one process it leaves what its commands leave in six; and other packages print nothing."""
    shutil.copytree(workspace / "data" / "cache", tmp_path / "data" / "cache")  # the scores' own networks
    running = commands.Command.calling(short_demo, tmp_path)
    assert running.wait(300) == 0, running.output()
    for name in ("digits_tokenizer", "digits_c2i"):
        one, own = (checkpoint(folder, name) for folder in (tmp_path, workspace))
        assert list(differences(one["state_dict"], own["state_dict"])) == []
        assert list(differences(one["ema"], own["ema"])) == []
    metrics = json.loads((tmp_path / "runs" / "digits_c2i" / "evaluation" / "metrics.json").read_text())["metrics"]
    printed, errors = running.output()
    assert f"{metrics['fid']:.1f}" in printed
    for number in range(1, 7):
        assert f"{number}/6" in printed
    for path, _ in demo.PICTURES:
        assert (tmp_path / path).exists()
        assert path in printed
    assert errors == ""
    assert "warn" not in printed.lower()


def test_checkpoint_is_self_contained(workspace, tmp_path):
    """It samples from a folder of its own, without the tokenizer's run."""
    ckpt = tmp_path / "alone.ckpt"
    ckpt.write_bytes((workspace / "runs/digits_c2i/checkpoints/best.ckpt").read_bytes())
    succeed(tmp_path, "sample", f"ckpt={ckpt} labels=[3,7] num=6 sampler=entropy out={tmp_path}/out images=true")
    report = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert report["labels"] == [3, 7, 3, 7, 3, 7]
    assert len(report["steps"]) == len(report["entropy"]) == 6
    assert all(12 <= steps <= 30 for steps in report["steps"])  # the checkpoint's own calibration
    assert Image.open(tmp_path / "out" / "samples.png").format == "PNG"
    film = Image.open(tmp_path / "out" / "refinement.gif")
    assert film.n_frames == max(report["steps"]) + 1 or (tmp_path / "out" / "refinement.gif").stat().st_size > 500_000
    assert film.n_frames >= 8  # some are left out of a film that would be too large
    assert Image.open(tmp_path / "out" / "images" / "00001-7.png").size == (32, 32)


@full
def test_samples_do_not_depend_on_the_batch(workspace, tmp_path):
    for name, batch in (("a", 8), ("b", 3)):
        succeed(
            workspace,
            "sample",
            f"ckpt=runs/digits_c2i num=8 batch_size={batch} sampler=linear sampler.schedule.steps=5 "
            f"out={tmp_path}/{name}",
        )
    first, second = (Image.open(tmp_path / name / "samples.png").tobytes() for name in "ab")
    assert first == second


def test_calibrated_samples_take_the_steps_asked_for(workspace, tmp_path):
    """Of the weights as trained: the average of so few steps is as sure of one sample as of another."""
    asked = "ckpt=runs/digits_c2i ema=none target_steps=9 tmin=5 tmax=14 wp=2 num=400"
    done = succeed(workspace, "calibrate", asked, processes=2)
    assert done.stdout.count("fitted") == 1
    assert "fresh" in done.stdout
    assert "sampler=calibrated" in done.stdout
    arguments = f"ckpt=runs/digits_c2i/checkpoints/best.ckpt ema=none num=100 seed=5 film=false out={tmp_path}"
    succeed(workspace, "sample", f"{arguments} sampler=calibrated")
    steps = json.loads((tmp_path / "samples.json").read_text())["steps"]
    assert 5 <= min(steps) < max(steps) <= 14
    assert sum(steps) / 100 == pytest.approx(9, rel=0.1)


def test_evaluate_writes_metrics(workspace):
    succeed(
        workspace,
        "evaluate",
        "ckpt=runs/digits_c2i num=20 sampler=entropy sampler.schedule.max_steps=12 data.num_workers=0",
    )
    report = json.loads((workspace / "runs/digits_c2i/evaluation/metrics.json").read_text())
    expected = {"fid", "fid_val", "isc_mean", "judge_accuracy", "judge_val_accuracy", "nn_median_ratio"}
    assert expected <= report["metrics"].keys()
    assert report["metrics"]["judge_val_accuracy"] >= 0.97
    assert sum(report["steps_histogram"].values()) == 20
    assert len(report["steps_by_class"]) == 10
    for name in ("nearest.png", "steps.png"):
        assert Image.open(workspace / "runs/digits_c2i/evaluation" / name).format == "PNG"
    assert report["metrics"]["fid_samples"] == 20
    assert len(report["provenance"]["weights_sha256"]) == 64
    assert report["settings"]["sampler"]["schedule"]["max_steps"] == 12
    # Other settings go beside it, and are refused where they were sent into it.
    other = "ckpt=runs/digits_c2i num=20 sampler=linear sampler.schedule.steps=2 scores=none data.num_workers=0"
    succeed(workspace, "evaluate", other)
    (beside,) = (workspace / "runs/digits_c2i").glob("evaluation-*")
    assert json.loads((workspace / "runs/digits_c2i/evaluation/metrics.json").read_text()) == report
    done = grn(workspace, "evaluate", f"{other} out=runs/digits_c2i/evaluation")
    assert done.returncode == 1
    assert "has results of other settings (sampler.schedule" in done.stderr
    succeed(workspace, "compare", f"runs/digits_c2i {beside.relative_to(workspace)} samples=3")
    page = (workspace / "runs/comparison/compare.html").read_text()
    assert "<td>sampler.schedule.max_steps</td><td>12</td>" in page
    assert page.count("data:image/png") == 6
    succeed(workspace, "evaluate", "ckpt=runs/digits_tokenizer")
    report = json.loads((workspace / "runs/digits_tokenizer/evaluation/metrics.json").read_text())
    assert {"psnr", "ssim", "l1", "rfid"} <= report["metrics"].keys()


OPTIONS = " scores.fid.isc=true scores.fid.kid=true scores.fid.kid_subset_size=20 scores.fid.prc=true"


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        # Of 20 samples, three processes get 7, 7 and 6; of 297 held-out digits in 4 shards, two get 2 shards each.
        pytest.param(
            *(3, "ckpt=runs/digits_c2i num=20 batch_size=4 images=true sampler=entropy scores=digits" + OPTIONS),
            marks=full,
        ),
        (2, "ckpt=runs/digits_tokenizer scores=digits_reconstruction" + OPTIONS),
    ],
)
def test_several_processes_score_as_one(workspace, tmp_path, processes, arguments):
    succeed(workspace, "evaluate", f"{arguments} out={tmp_path}/one")
    done = succeed(workspace, "evaluate", f"{arguments} out={tmp_path}/several", processes=processes)
    assert done.stdout.count("psnr") + done.stdout.count("judge_accuracy") == 1  # one table
    one, several = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "several"))
    numbers = [report.pop("metrics") for report in (one, several)]
    assert one == several
    assert [report.pop("seconds") > 0 for report in numbers] == [True, True]
    assert any("kid_mean" in key for key in numbers[0])
    # The sums are in float64; what is left is float32 of the networks, whose last bits depend on the size of a batch.
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-5, abs=2e-6)
    written = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "several").iterdir()} == written
    for name in written & {"samples.npz", "samples.png", "nearest.png"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "several" / name).read_bytes()
    assert ("samples.npz" in written) == ("images=true" in arguments)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        pytest.param("ckpt=runs/digits_c2i num=15", "error: num=15 is not", marks=full),  # of every process
        pytest.param(
            "ckpt=runs/digits_c2i nmu=20", "error: no config key 'nmu'", marks=full
        ),  # before there is a group
        ("ckpt=runs/digits_c2i num=20 images=true out=blocked", "error: rank 1: images=true: "),  # of one alone
    ],
)
def test_mistakes_of_several_processes_take_one_line(workspace, arguments, line):
    (workspace / "blocked" / ".samples.npz.1").mkdir(parents=True, exist_ok=True)
    done = grn(workspace, "evaluate", arguments + " sampler=linear sampler.schedule.steps=2", processes=2)
    assert done.returncode != 0
    (error,) = [said for said in done.stderr.splitlines() if said.startswith("error: ")]
    assert error.startswith(line)
    # What the others had kept is gone.
    assert {path.name for path in (workspace / "blocked").iterdir()} <= {".samples.npz.1", "evaluate.log"}


def differences(a, b, path=""):
    """Paths at which two checkpoints differ, tensors compared bit by bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from differences(a.get(key, "missing"), b.get(key, "missing"), f"{path}/{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            yield from differences(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        if not (isinstance(b, torch.Tensor) and torch.equal(a, b)):
            yield path
    elif a != b:
        yield path


def checkpoint(workspace, name):
    """What training goes on from, as a single file would have it."""
    path = workspace / "runs" / name / "checkpoints" / "last.ckpt"
    return read_sharded(path, "") if path.is_dir() else torch.load(path, weights_only=True)


def broken_off(workspace, command, name, send):
    """Starts a run, and after its first checkpoint ends it by `send(pid)`; returns the exit status."""
    process = grn(workspace, "train", command + name, background=True)
    last = workspace / "runs" / name / "checkpoints" / "last.ckpt"
    while not is_checkpoint(last):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    send(process.pid)
    return process.wait(timeout=120)


def assert_same_bits(whole, resumed):
    for part in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step"):
        assert list(differences(whole[part], resumed[part])) == []
    data = [c["loops"]["fit_loop"]["state_dict"]["combined_loader"] for c in (whole, resumed)]
    assert list(differences(*data)) == []


@pytest.mark.parametrize("kind", ["refiner", pytest.param("tokenizer", marks=full)])
def test_killed_and_resumed_ends_with_the_same_bits(workspace, kind):
    """SIGKILL at some step after the first checkpoint, then the same command with ckpt_path=last."""
    command = (REFINER if kind == "refiner" else TOKENIZER + " callbacks.last.every_n_train_steps=3") + " logger=csv"
    command += " trainer.max_steps=40 scores=none name="
    succeed(workspace, "train", command + f"whole_{kind}")
    broken_off(workspace, command, f"killed_{kind}", lambda pid: os.kill(pid, signal.SIGKILL))
    assert 0 < checkpoint(workspace, f"killed_{kind}")["global_step"] < 40
    succeed(workspace, "train", command + f"killed_{kind} ckpt_path=last")
    assert_same_bits(checkpoint(workspace, f"whole_{kind}"), checkpoint(workspace, f"killed_{kind}"))


@pytest.mark.parametrize(
    ("ranks", "send"),
    [
        pytest.param("one", os.killpg, id="one rank and its workers, as SLURM does", marks=full),
        pytest.param("ddp", os.killpg, id="two ranks and their workers", marks=full),
        pytest.param("ddp", os.kill, id="one of two ranks", marks=full),
        pytest.param("fsdp", os.killpg, id="two ranks with shards", marks=full),
    ],
)
def test_sigterm_saves_and_the_run_goes_on_with_the_same_bits(workspace, ranks, send):
    command = REFINER + {"one": "", "ddp": TWO_RANKS, "fsdp": TWO_SHARDS}[ranks]
    command += " logger=csv trainer.max_steps=60 scores=none callbacks.last.every_n_train_steps=10 name="
    whole, name = f"whole_{ranks}", f"stopped_{ranks}_{send.__name__}"
    if not (workspace / "runs" / whole).exists():
        succeed(workspace, "train", command + whole)
    status = broken_off(workspace, command, name, lambda pid: send(pid, signal.SIGTERM))
    assert status == 128 + signal.SIGTERM
    step = checkpoint(workspace, name)["global_step"]
    assert 10 <= step < 60
    log = (workspace / "runs" / name / "train.log").read_text()
    assert log.splitlines()[-1] == f"stopped by SIGTERM after step {step}: ckpt_path=last resumes from there"
    assert "Traceback" not in log
    succeed(workspace, "train", command + name + " ckpt_path=last")
    assert_same_bits(checkpoint(workspace, whole), checkpoint(workspace, name))


def curves(workspace, name, *keys):
    """Step -> the values of `keys`, in all the times that a run was started."""
    values = {}
    for path in sorted((workspace / "runs" / name / "csv").rglob("metrics.csv")):
        with open(path) as file:
            for row in csv.DictReader(file):
                for key in keys:
                    if row.get(key):
                        values.setdefault(int(row["step"]), {})[key] = float(row[key])
    return values


@full  # that ranks share one curve is shown by the text refiner's two, that they share the data by test_endless.py
@pytest.mark.parametrize("ranks", [pytest.param(TWO_RANKS, id="ddp"), pytest.param(TWO_SHARDS, id="fsdp")])
def test_any_number_of_ranks_gives_one_curve_and_goes_on_from_the_others(workspace, ranks):
    """The same to rounding: one process, two, two that go on as one, one (without workers) that goes on as two."""
    command = REFINER + " logger=csv trainer.accumulate_grad_batches=2 trainer.log_every_n_steps=1 scores=none"
    command += " trainer.max_steps=40 trainer.val_check_interval=40"
    kind = ranks.split()[0].removeprefix("cluster=")
    one, two = command + " data.num_workers=0 name=", command + ranks + " name="
    if not (workspace / "runs" / "one").exists():
        succeed(workspace, "train", one + "one")
    succeed(workspace, "train", two + kind)
    for first, second, name in ((two, one, f"{kind}_to_one"), (one, two, f"one_to_{kind}")):
        broken_off(workspace, first, name, lambda pid: os.kill(pid, signal.SIGTERM))
        assert 3 <= checkpoint(workspace, name)["global_step"] < 40
        succeed(workspace, "train", second + name + " ckpt_path=last")

    keys = ("train/loss", "train/accuracy/mean", "train/grad_norm")
    expected, whole = curves(workspace, "one", *keys), checkpoint(workspace, "one")
    assert sorted(expected) == list(range(40))
    validated, there = curves(workspace, "one", "val/loss"), curves(workspace, kind, "val/loss")
    assert validated
    assert there == {step: pytest.approx(values, abs=1e-5) for step, values in validated.items()}
    for name in (kind, f"{kind}_to_one", f"one_to_{kind}"):
        found, ended = curves(workspace, name, *keys), checkpoint(workspace, name)
        assert found.keys() == expected.keys()
        for step in expected:
            assert found[step] == pytest.approx(expected[step], abs=1e-5), (name, step)
        for key, weight in whole["state_dict"].items():
            torch.testing.assert_close(ended["state_dict"][key], weight, rtol=0, atol=1e-5)
        data = [c["loops"]["fit_loop"]["state_dict"]["combined_loader"] for c in (whole, ended)]
        assert data[0] == data[1]


def test_a_sharded_run_is_scored_exported_and_made_one_file(workspace, tmp_path):
    """In bfloat16, its average sampled while it trains; it goes on from the single file, too."""
    command = REFINER + TWO_SHARDS + " logger=csv cluster.precision=bf16-mixed cluster.activation_checkpointing=full"
    succeed(workspace, "train", command + " name=sharded")
    (path,) = (workspace / "runs" / "sharded" / "csv").rglob("metrics.csv")
    assert "eval/fid" in path.read_text()
    last = workspace / "runs" / "sharded" / "checkpoints" / "last.ckpt"
    assert (last / "rest.pt").is_file()
    succeed(workspace, "consolidate", f"ckpt={last} out={tmp_path}/whole.ckpt")
    whole = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert list(differences(whole, checkpoint(workspace, "sharded"))) == []
    for ckpt, out in ((last, "a"), (tmp_path / "whole.ckpt", "b")):
        succeed(workspace, "sample", f"ckpt={ckpt} out={tmp_path}/{out} num=3 sampler=linear sampler.schedule.steps=2")
    assert (tmp_path / "a" / "samples.png").read_bytes() == (tmp_path / "b" / "samples.png").read_bytes()
    one_file = f"{REFINER} logger=none scores=none name=one_file trainer.max_steps=14"
    succeed(workspace, "train", f"{one_file} ckpt_path={tmp_path}/whole.ckpt")


@full
def test_two_processes_sample_and_score(workspace):
    succeed(workspace, "train", REFINER + TWO_RANKS + " name=scored_by_two logger=csv")
    assert checkpoint(workspace, "scored_by_two")["global_step"] == 12
    (path,) = (workspace / "runs" / "scored_by_two" / "csv").rglob("metrics.csv")
    assert "eval/fid" in path.read_text()


def test_samples_from_an_image(workspace, tmp_path):
    picture = workspace / "runs" / "digits_c2i" / "pictures" / "samples-step0000012.png"
    Image.open(picture).convert("RGB").resize((48, 48)).save(tmp_path / "init.png")
    mask = Image.new("L", (48, 48))
    mask.paste(255, (0, 0, 24, 48))
    mask.save(tmp_path / "mask.png")
    arguments = f"ckpt=runs/digits_c2i num=12 sampler=entropy init={tmp_path}/init.png strength=0.6"
    for size in (5, 12):
        succeed(workspace, "sample", f"{arguments} mask={tmp_path}/mask.png batch_size={size} out={tmp_path}/{size}")
    few, whole = (json.loads((tmp_path / size / "samples.json").read_text()) for size in ("5", "12"))
    assert few | {"seconds": 0} == whole | {"seconds": 0}
    assert few["strength"] == 0.6
    assert all(steps <= 18 for steps in few["steps"])  # of 30
    assert (tmp_path / "5" / "samples.png").read_bytes() == (tmp_path / "12" / "samples.png").read_bytes()


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@full
def test_optuna_looks_for_guidance(workspace):
    pytest.importorskip("optuna", minversion="4", reason="pip install 'grn[optuna]'")
    searched = "+search=guidance ckpt=runs/digits_c2i num=20 sampler=linear sampler.schedule.steps=2 out=searched"
    done = succeed(workspace, "evaluate", searched + " hydra.sweeper.n_trials=2")
    rows = rows_of(workspace / "searched" / "table.csv")
    assert len(rows) == 2
    assert all(0.9 <= float(row["sampler.temperature"]) <= 1.6 for row in rows)
    assert f"best: point {rows[0]['point']}, " in done.stdout + done.stderr
    succeed(workspace, "evaluate", searched + " hydra.sweeper.n_trials=3")
    assert sorted(row["point"] for row in rows_of(workspace / "searched" / "table.csv")) == ["0", "1", "2"]


@full
def test_optuna_looks_for_how_to_train(workspace):
    """Learning rates that are worse than the median are ended early."""
    pytest.importorskip("optuna", minversion="4", reason="pip install 'grn[optuna]'")
    searched = REFINER.replace(" data.batch_size=20", "") + " +search=training scores=none logger=none name=searched"
    searched += " trainer.val_check_interval=4 hydra.sweeper.pruner.n_startup_trials=1 hydra.sweeper.n_trials=5"
    searched += " data.batch_size=choice(16,20) training.signal_ratio_mean=-1 training.signal_ratio_std=1"
    searched += " callbacks.grid=null training.learning_rate=tag(log,interval(1e-6,1e-2))"
    done = succeed(workspace, "train", searched)
    rows = rows_of(workspace / "runs" / "sweeps" / "searched" / "table.csv")
    assert {row["data.batch_size"] for row in rows} <= {"16", "20"}
    assert len(rows) == 5
    steps = {
        torch.load(workspace / "runs" / "sweeps" / "searched" / row["point"] / "checkpoints" / "last.ckpt")[
            "global_step"
        ]
        for row in rows
    }
    assert "ended early at step" in done.stdout + done.stderr
    assert min(steps) < max(steps) == 12


@pytest.mark.parametrize("launcher", ["", pytest.param(" hydra/launcher=parallel", marks=full)])
def test_a_point_that_fails_leaves_the_others(workspace, launcher):
    if launcher:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install 'grn[joblib]'")
    name = "half_failed_aside" if launcher else "half_failed"
    short = f" trainer.max_steps=2 trainer.val_check_interval=2 scores=none logger=none name={name}"
    short += " data.root=nowhere,data/digits" + launcher
    done = grn(workspace, "train", "-m +experiment=digits_tokenizer model.dim=8 training.warmup_steps=1" + short)
    assert done.returncode == 1
    assert "error: point 0: data.train: no shards at nowhere" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: 1 point of the sweep failed: 0; table.csv names why"
    rows = rows_of(workspace / "runs" / "sweeps" / name / "table.csv")
    assert [(row["point"], row["data.root"], row["failed"][:23]) for row in rows] == [
        ("1", "data/digits", ""),
        ("0", "nowhere", "data.train: no shards a"),
    ]


def test_sweeps_leave_a_folder_a_point(workspace):
    short = " trainer.max_steps=2 trainer.val_check_interval=2 scores=none name=swept training.learning_rate=1e-3,2e-3"
    succeed(workspace, "train", "-m +experiment=digits_tokenizer model.dim=8 training.warmup_steps=1" + short)
    for point, rate in (("0", 0.001), ("1", 0.002)):
        folder = workspace / "runs" / "sweeps" / "swept" / point
        assert f"learning_rate: {rate}" in (folder / "config.yaml").read_text()
        assert (folder / "checkpoints" / "last.ckpt").is_file()
        (run,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
        (about,) = [record.run for record in wandb_records(run) if record.run.display_name]
        assert (about.display_name, about.run_group) == (f"sweeps/swept/{point}", "swept")
        assert "digits" in about.tags
    rows = rows_of(workspace / "runs" / "sweeps" / "swept" / "table.csv")
    assert [float(row["val/psnr"]) for row in rows] == sorted((float(row["val/psnr"]) for row in rows), reverse=True)
    scored = "-m ckpt=runs/digits_c2i num=20 sampler=linear sampler.schedule.steps=2 sampler.temperature=1.2,1.31"
    done = succeed(workspace, "evaluate", scored + " out=scored")
    rows = rows_of(workspace / "scored" / "table.csv")
    assert sorted(row["sampler.temperature"] for row in rows) == ["1.2", "1.31"]
    assert [float(row["fid"]) for row in rows] == sorted(float(row["fid"]) for row in rows)
    assert "table.csv" in done.stdout
    sampled = "-m ckpt=runs/digits_c2i num=4 sampler=linear sampler.schedule.steps=2,3 out=swept"
    succeed(workspace, "sample", sampled)
    steps = [json.loads((workspace / "swept" / point / "samples.json").read_text())["steps"] for point in "01"]
    assert steps == [[2] * 4, [3] * 4]


def test_changed_keys_take_effect_and_milestones_are_scored_against_steps(workspace):
    shutil.copytree(workspace / "runs/digits_c2i", workspace / "runs/changed")
    changed = " name=changed ckpt_path=last trainer.max_steps=16 scores=none training.learning_rate=1e-5"
    changed += " training.lr_schedule=constant training.weight_decay=0.5 training.betas=[0.8,0.9]"
    light = " callbacks.milestones.every_n_train_steps=2 callbacks.milestones.save_weights_only=true"
    done = succeed(workspace, "train", REFINER + changed + light)
    assert "learning rate: 1e-05 at a global batch of 20 (data.batch_size=20)" in done.stdout + done.stderr
    folder = workspace / "runs/changed/checkpoints"
    (optimizer,) = torch.load(folder / "last.ckpt", weights_only=True)["optimizer_states"]
    assert {(group["lr"], tuple(group["betas"])) for group in optimizer["param_groups"]} == {(1e-5, (0.8, 0.9))}
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.5, 0.0]
    rates = curves(workspace, "changed", "train/lr")
    assert [rates[step]["train/lr"] for step in sorted(rates)][-1] == pytest.approx(1e-5)
    assert min(rates) < 12 < max(rates)

    kept = [folder / f"step_000000{step}.ckpt" for step in (14, 16)]
    assert sorted(folder.glob("step_*")) == kept
    assert "optimizer_states" not in torch.load(kept[0], weights_only=True)
    scored = f"-m ckpt={kept[0]},{kept[1]} num=20 scores=digits sampler=linear sampler.schedule.steps=2"
    succeed(workspace, "evaluate", scored)
    rows = rows_of(workspace / "runs/changed/evaluation/table.csv")
    assert sorted(row["step"] for row in rows) == ["14", "16"]
    assert (workspace / "runs/changed/evaluation/curve.png").is_file()
    succeed(workspace, "export", f"ckpt={kept[0]} out={workspace}/milestone")
    provenance = json.loads((workspace / "milestone/refiner/config.json").read_text())["_provenance"]
    assert (provenance["step"], provenance["ema"]) == (14, "0.99")


@pytest.mark.parametrize(
    ("verb", "arguments", "expected"),
    [
        ("train", "+experiment=digits_c2i cluster.activation_checkpointing=some name=x", "none, selective, full"),
        ("train", TOKENIZER + TWO_SHARDS + " cluster.activation_checkpointing=none name=x", "cluster=ddp"),
        ("train", REFINER + TWO_SHARDS + " cluster.strategy.shard_size=3 name=x", "divide the 2 ranks"),
        ("consolidate", "ckpt=runs/digits_c2i", "a single file already"),
        ("train", "+experiment=digits_c2i modle.depth=3", "did you mean model"),
        ("train", "+experiment=digits_c2i model.dpeth=3", "did you mean depth"),
        ("train", "+experiment=digits_c2i +modle.depth=3", "no config key 'modle'"),
        ("train", "+experiment=digits_c2i cluster.compile=maybe", "cluster.compile must be true or false"),
        ("train", "+experiment=digits_c2i cluster.compile_mode=fast", "cluster.compile_mode=fast: choose among"),
        ("train", "+experiment=digits_c2i trainer.devices=2", "give cluster.devices=2"),
        ("train", "+experiment=digits_c2i +model.dpeth=3 name=x", "dpeth"),
        ("train", "+experiment=digitz", "digits_c2i"),
        ("train", REFINER, "ckpt_path=last"),
        ("train", REFINER + " ckpt_path=last name=nothing", "there is no"),
        ("train", REFINER + " ckpt_path=last", "trainer.max_steps"),
        ("train", REFINER + " ckpt_path=last model.depth=3", "model.depth=2"),
        ("train", REFINER + " ckpt_path=last data.rank_streams=4", "data.rank_streams=8"),
        ("train", REFINER + " name=x data.num_workers=2", "data.worker_streams=1"),
        ("train", REFINER + " name=x data.root=/nowhere", "data"),
        ("train", REFINER + " name=x tokenizer.ckpt=/nowhere", "tokenizer.ckpt"),
        ("train", REFINER + " name=x tokenizer.ckpt=runs/digits_c2i", "not a tokenizer"),
        ("train", REFINER + " name=x model.channels=5", "needs model.channels=4 model.classes=16"),
        ("train", REFINER + " name=x data.batch_size=0", "data.batch_size"),
        ("train", REFINER + NAN + " name=nan logger=csv", "NaN"),
        (
            "train",
            REFINER + " monitor=val/los name=monitored logger=csv scores=none",
            "monitor=val/los was not measured",
        ),
        ("sample", "", "ckpt must be given"),
        ("sample", "ckpt=runs/digits_c2i sampler.schedule.max_steps=9", "add sampler=linear"),
        ("sample", "ckpt=/nowhere", "no such checkpoint"),
        ("sample", "ckpt=data/digits/manifest.json out=o", "cannot be read as a checkpoint"),
        ("sample", "ckpt=runs/digits_tokenizer out=o", "only refiners are sampled"),
        ("sample", "ckpt=runs/digits_c2i labels=[11] out=o", "labels of this checkpoint are 0..9"),
        ("sample", "ckpt=runs/digits_c2i ema=0.5 out=o", "it holds"),
        ("sample", "ckpt=runs/digits_c2i sampler.temperature=-1 out=o", "sampler.temperature"),
        ("sample", "ckpt=runs/digits_c2i batch_size=0 out=o", "batch_size=0 must be a whole number, at least 1"),
        ("sample", "ckpt=runs/digits_c2i mask=mask.png out=o", "init=image.png"),
        ("sample", "ckpt=runs/digits_c2i init=/nowhere.png out=o", "no such file"),
        ("sample", "ckpt=runs/digits_c2i sampler=calibrated sampler.file=no.yaml out=o", "python -m grn.calibrate"),
        ("calibrate", "ckpt=runs/digits_c2i out=o", "target_steps must be given"),
        ("calibrate", "ckpt=runs/digits_c2i target_steps=40 out=o", "between tmin=12 and tmax=30"),
        ("evaluate", "ckpt=runs/digits_c2i num=15 out=o", "num=15"),
        ("evaluate", "ckpt=runs/digits_tokenizer images=true out=o", "images=true keeps the samples of a refiner"),
        ("evaluate", "ckpt=runs/digits_c2i scores=imagenet scores.fid.kid=true out=o", "scores.fid.kid compares"),
        ("prepare", "data=nothing", "digits"),
        ("prepare", "data=imagenet", "root"),
        ("prepare", "data=imagenet root=/nowhere", "/nowhere"),
        ("train", "+experiment=tokenizer_image name=x training.perceptual.weights=/nowhere", "training.perceptual"),
        ("train", REFINER + " name=x data=tokens", "data.root"),
        ("train", REFINER + " name=x data=tokens data.root=data/digits", "grn.encode"),
        ("train", REFINER + " name=x data=checkpoint", "data=checkpoint is for grn.evaluate"),
        ("encode", "", "ckpt must be given"),
        ("encode", "ckpt=runs/digits_c2i", "not a tokenizer"),
        ("encode", "ckpt=runs/digits_tokenizer data=imagenet", "python -m grn.prepare data=imagenet"),
        ("encode", "ckpt=runs/digits_tokenizer data.image_size=30", "the nearest is 32"),
        ("export", "ckpt=runs/digits_c2i tokenizer.ckpt=runs/digits_tokenizer", "knows its tokenizer; leave it out"),
        ("export", "ckpt=runs/digits_c2i ema=0.5", "it holds"),
        ("encode", "ckpt=data/digits/manifest.json", "cannot be read as a checkpoint"),
        ("evaluate", "ckpt=hf://grn-tests/nothing out=o", "give data=... and scores=..."),
        ("evaluate", "ckpt=runs/nowhere", "no such checkpoint"),
        ("prepare", "data=tokens", "digits"),
        ("train", TOKENIZER + " ckpt_path=last training.gan_weight=1", "without a discriminator"),
        # What would come to light with the last validation, comes with the first step.
        ("train", LATE + " scores.fid.reference=/nope.npz", "scores.fid.reference: no such file: /nope.npz"),
        ("train", LATE + " callbacks.scores.num=15", "callbacks.scores.num=15 is not a multiple of the 10 classes"),
        ("train", LATE + " scores.fid.kid=true", "scores.fid.kid_subset_size=1000 is more than"),
        ("train", LATE + " callbacks.scores.every=-1", "callbacks.scores.every=-1"),
        ("train", LATE + " trainer.log_every_n_steps=0", "trainer.log_every_n_steps=0 must be a whole number"),
        ("train", LATE + " +trainer.overfit_batches=0.5", "trainer.overfit_batches=0.5: give a whole number"),
        ("train", LATE + " trainer.check_val_every_n_epoch=1 +trainer.limit_train_batches=2", "val_check_interval"),
        ("train", TOKENIZER + " name=x logger=none trainer.accumulate_grad_batches=2", "accumulat"),
        ("evaluate", "ckpt=runs/digits_c2i scores=digits scores.fid.kid=true num=20 out=o", "kid_subset_size=1000 is"),
        (
            "evaluate",
            "ckpt=runs/digits_c2i scores=digits scores.fid.reference=/nope.npz out=o",
            "no such file: /nope.npz",
        ),
        ("evaluate", "ckpt=runs/digits_c2i scores=imagenet num=20 out=o", "scores.fid.reference: no such file"),
    ],
)
def test_mistakes_take_one_line(workspace, monkeypatch, verb, arguments, expected):
    assert expected in mistaken(workspace, monkeypatch, verb, arguments)


def test_a_run_goes_on_in_its_wandb_run(workspace):
    """So do its samples; W&B's own steps rise over all its offline files."""
    run = REFINER + " name=one_wandb_run logger=wandb scores=none trainer.log_every_n_steps=1 trainer.max_steps="
    succeed(workspace, "train", run + "3")
    time.sleep(1)  # W&B names its offline folders by the second
    succeed(workspace, "train", run + "6 ckpt_path=last")
    time.sleep(1)
    succeed(workspace, "sample", "ckpt=runs/one_wandb_run num=2 sampler=linear sampler.schedule.steps=2")
    names, steps, keys = set(), [], set()
    files = sorted((workspace / "runs" / "one_wandb_run" / "wandb").glob("offline-run-*/run-*.wandb"))
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
        for record in wandb_records(path):
            names |= {record.run.run_id} - {""}
            row = {"/".join(it.nested_key) or it.key: it.value_json for it in record.history.item}
            keys |= {key.partition("/_")[0] for key in row}
            steps += [int(row["_step"])] if row else []
    assert len(files) == 3
    assert len(names) == 1
    assert steps == sorted(set(steps)) == list(range(7))  # the last of them of the samples
    assert {"train/loss", "val/loss", "sample/samples", "sample/steps_mean"} <= keys


def test_own_pictures_take_one_attempt(tmp_path):
    """A folder of folders becomes shards, a tokenizer and a refiner; sizes, classes and streams follow the pictures."""
    noise = torch.Generator().manual_seed(0)
    for number in range(20):
        path = tmp_path / "photos" / f"class {number % 3}" / f"IMG_{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (40, 48, 3), generator=noise, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    succeed(tmp_path, "prepare", "data=image_folder root=photos source.image_size=32 num_workers=0")
    short = " trainer.max_steps=2 trainer.val_check_interval=2 logger=none data.num_workers=0"
    done = succeed(tmp_path, "train", "+experiment=image_folder_tokenizer model.dim=8 model.decoder_dim=8" + short)
    assert "warm-up: 0 steps, as training.warmup_steps=100 is no less" in done.stdout + done.stderr
    c2i = "+experiment=image_folder_c2i model.depth=3 model.width=32 model.heads=1 callbacks.film=null"
    c2i += " callbacks.grid.num=3" + short
    succeed(tmp_path, "train", c2i)
    network = torch.load(tmp_path / "runs/image_folder_c2i/checkpoints/last.ckpt", weights_only=True)["config"]["model"]
    assert (network["num_labels"], network["size"]) == (3, 4)
    wrong = grn(tmp_path, "train", c2i + " name=x model.num_labels=10")
    assert wrong.returncode == 1
    assert "error: model.num_labels=10 does not fit data.num_labels=3" in wrong.stderr
    wrong = grn(tmp_path, "train", c2i + " name=x data.root=nowhere")
    assert wrong.stderr.splitlines()[-1].startswith("error: data.train: no shards at nowhere/train-")


def test_own_clips_take_one_attempt(tmp_path):
    """Eight videos with captions become shards, a tokenizer and a text refiner; streams follow the number of shards."""
    (tmp_path / "films").mkdir()
    for number in range(8):
        frames = (torch.full((3, 48, 64), (number * 30 + 5 * t) % 256, dtype=torch.uint8) for t in range(30))
        with open(tmp_path / "films" / f"film {number}.mp4", "wb") as file:
            write_mp4(frames, file, fps=24)
        (tmp_path / "films" / f"film {number}.txt").write_text(f"it grows lighter, {number}")
    done = succeed(tmp_path, "prepare", "data=clips root=films num_workers=0")
    assert "wrote 7 train, 1 val" in done.stdout + done.stderr
    short = " trainer.max_steps=2 trainer.val_check_interval=2 logger=none data.num_workers=0"
    succeed(tmp_path, "train", "+experiment=clips_tokenizer model.dim=8 model.decoder_dim=8 data.image_size=32" + short)
    t2v = "+experiment=clips_t2v model.depth=2 text_encoder.depth=1 data.max_tokens=512"
    t2v += " data.resolutions=[[32,32]] callbacks.film=null callbacks.grid.num=1 sampler.schedule.steps=2"
    succeed(tmp_path, "train", t2v + short)
    saved = torch.load(tmp_path / "runs/clips_t2v/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    data, asked = saved["config"]["data"], saved["config"]["training"]
    assert (data["rank_streams"], asked["size"], asked["frames"]) == (4, [32, 32], 17)


@full
def test_flags_for_debugging(workspace, monkeypatch):
    runs = workspace / "runs"
    cosine = REFINER + " training.lr_schedule=cosine training.warmup_steps=100 trainer.max_steps=200"
    grn_here(workspace, monkeypatch, "train", cosine + " name=tried_out +trainer.fast_dev_run=true")
    assert [path.name for path in (runs / "tried_out").rglob("*")] == ["train.log"]
    short = REFINER + " name=overfitted logger=csv scores=none +trainer.overfit_batches=2 trainer.log_every_n_steps=1"
    grn_here(workspace, monkeypatch, "train", short)
    assert torch.load(runs / "overfitted" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 12


def test_debugging(workspace, monkeypatch):
    """What +debug=smoke keeps, that +debug=overfit does overfit, whose loss falls, and where the profile is."""
    runs = workspace / "runs"
    grn_here(workspace, monkeypatch, "train", "+debug=smoke " + REFINER + " name=tried_out")
    assert [path.name for path in (runs / "tried_out").rglob("*")] == ["train.log"]
    short = REFINER.replace(" data.batch_size=20", " data.batch_size=4") + " trainer.log_every_n_steps=1"
    short += " callbacks.grid=null callbacks.film=null"
    grn_here(workspace, monkeypatch, "train", f"{short} +debug=overfit trainer.max_steps=80 training.warmup_steps=0")
    (path,) = (runs / "debug" / "digits_c2i" / "csv").rglob("metrics.csv")
    with open(path) as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 80
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    grn_here(workspace, monkeypatch, "train", f"{short} +debug=profile trainer.max_steps=2")
    report = (runs / "debug" / "digits_c2i" / "fit-profile.txt").read_text()
    assert "RefinerModule.optimizer_step" in report


def test_a_mistake_on_the_command_line_exits_with_one(workspace):
    done = grn(workspace, "train", "+experiment=digits_c2i modle.depth=3")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_nan_leaves_no_checkpoint_with_it(workspace, monkeypatch):
    mistaken(workspace, monkeypatch, "train", REFINER + NAN + " name=nan2 logger=csv")
    for path in (workspace / "runs" / "nan2").rglob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.fixture(scope="module")
def encoded(workspace):
    succeed(workspace, "encode", "ckpt=runs/digits_tokenizer data=digits")
    return workspace / "data" / "digits_tokens"


@full
def test_a_refiner_trained_from_tokens_has_the_same_bits_as_from_pixels(workspace, encoded):
    succeed(workspace, "train", REFINER + f" name=from_tokens data=tokens data.root={encoded} logger=csv")
    from_pixels, from_tokens = (
        torch.load(workspace / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("digits_c2i", "from_tokens")
    )
    for part in ("state_dict", "ema", "optimizer_states", "global_step"):
        assert list(differences(from_pixels[part], from_tokens[part])) == []
    (path,) = (workspace / "runs" / "from_tokens" / "csv").rglob("metrics.csv")
    assert "eval/fid" in path.read_text()  # against the images that were encoded


def test_encoding_again_does_nothing(workspace, encoded):
    before = {path: path.stat().st_mtime_ns for path in encoded.iterdir()}
    assert "nothing to do" in succeed(workspace, "encode", "ckpt=runs/digits_tokenizer data=digits").stdout
    assert {path: path.stat().st_mtime_ns for path in encoded.iterdir()} == before


@full
def test_two_ranks_share_the_encoding(workspace, encoded):
    """As torchrun starts them; whoever comes last publishes."""
    out = workspace / "shared_tokens"
    for rank in ("0", "1"):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        ranks |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
        done = grn(workspace, "encode", f"ckpt=runs/digits_tokenizer data=digits out={out}", environment=ranks)
        assert done.returncode == 0, done.stderr
        assert out.exists() == (rank == "1")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in encoded.iterdir()
    }


def test_an_export_is_the_tokenizer(workspace, encoded, tmp_path):
    """Scored and encoded with from a folder of its own."""
    done = succeed(workspace, "export", f"ckpt=runs/digits_tokenizer out={tmp_path}/export")
    assert json.loads((encoded / "manifest.json").read_text())["tokenizer"]["sha256"] in done.stdout
    arguments = f"data=digits scores=digits_reconstruction out={tmp_path}"
    succeed(workspace, "evaluate", f"ckpt={tmp_path}/export {arguments}/a")
    succeed(workspace, "evaluate", f"ckpt=runs/digits_tokenizer {arguments}/b")
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text())["metrics"] for name in "ab")
    assert {"psnr", "ssim", "l1", "rfid", "bits_per_image", "bit_entropy_1", "error_4", "error_max_4"} <= first.keys()
    assert first | {"seconds": 0} == second | {"seconds": 0}
    assert "nothing to do" in succeed(workspace, "encode", f"ckpt={tmp_path}/export data=digits").stdout
    succeed(workspace, "train", REFINER + f" name=from_export tokenizer.ckpt={tmp_path}/export logger=csv scores=none")


def test_an_exported_refiner_is_sampled_and_scored(workspace, tmp_path):
    """From a folder that holds everything, wherever it is; the scores are the checkpoint's."""
    how = "sampler=linear sampler.schedule.steps=4 license=cc-by-4.0"
    succeed(workspace, "export", f"ckpt=runs/digits_c2i out={tmp_path}/digits {how}")
    assert "license: cc-by-4.0" in (tmp_path / "digits" / "README.md").read_text()
    scored = "num=20 data=digits data.num_workers=0 scores=digits"
    succeed(workspace, "evaluate", f"ckpt={tmp_path}/digits {scored}")
    steps = "sampler=linear sampler.schedule.steps=4"
    succeed(workspace, "evaluate", f"ckpt=runs/digits_c2i {scored} {steps} out={tmp_path}/b")
    reports = [
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("digits_results/evaluation", "b")
    ]
    assert "fid" in reports[0]["metrics"]
    assert reports[0]["metrics"] | {"seconds": 0} == reports[1]["metrics"] | {"seconds": 0}
    assert (reports[0]["step"], reports[0]["ckpt"]) == (reports[1]["step"], str(tmp_path / "digits"))
    done = grn(workspace, "evaluate", f"ckpt={tmp_path}/digits out={tmp_path}/c")
    assert "give data=... and scores=..." in done.stderr
    assert "Traceback" not in done.stderr


TINY = " model.latent_channels=4 model.dim=8 model.decoder_dim=8 model.multipliers=[1,1,1] model.temporal=[true,true]"
TINY += " model.blocks_per_stage=1 training.perceptual_weight=0 training.discriminator.layers=1"
TINY += " training.discriminator.width=4 trainer.max_steps=8 trainer.val_check_interval=4 trainer.log_every_n_steps=1"
TINY += " logger=csv"
JOINT = "+experiment=tokenizer_joint training.gan_start=2 training.discriminator.dimensions=3" + TINY
JOINT += " data.parts.clips.image_size=32 data.parts.clips.frames=5 data.parts.clips.batch_size=2"
JOINT += " data.parts.clips.num_workers=1 data.parts.images.root=data/digits data.parts.images.image_size=32"
JOINT += " data.parts.images.num_labels=10 data.parts.images.batch_size=8 data.parts.images.num_workers=1"
JOINT += " data.parts.images.train_samples=1500 data.parts.images.rank_streams=4 data.parts.images.worker_streams=1"
JOINT += " data.parts.clips.rank_streams=2 data.parts.clips.worker_streams=1"


@full
def test_images_and_videos_train_one_tokenizer(workspace, moving_digits):
    """From a folder of mp4 files to scores of both kinds; killed on the way, it ends with the same bits."""
    folder = moving_digits(workspace / "videos", 12)
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "broken.txt").write_text("nothing")
    succeed(workspace, "prepare", f"data=video root={folder} source.val=3 source.shard_size=4 num_workers=0")
    assert "broken.mp4" in (workspace / "data" / "video" / "rejected.jsonl").read_text()
    succeed(workspace, "train", JOINT)
    run = workspace / "runs" / "tokenizer_joint"
    (path,) = (run / "csv").rglob("metrics.csv")
    with open(path) as file:
        seen = {key for row in csv.DictReader(file) for key, value in row.items() if value}
    assert {"train/gan", "train/discriminator", "val/psnr", "val/clips/psnr"} <= seen
    assert len(list((run / "pictures").iterdir())) == 4

    succeed(workspace, "train", JOINT + " name=stopped trainer.max_steps=3 callbacks.last.every_n_train_steps=3")
    succeed(workspace, "train", JOINT + " name=stopped ckpt_path=last")
    whole, resumed = (
        torch.load(workspace / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("tokenizer_joint", "stopped")
    )
    for part in ("state_dict", "ema", "optimizer_states", "global_step"):
        assert list(differences(whole[part], resumed[part])) == []

    succeed(workspace, "evaluate", "ckpt=runs/tokenizer_joint scores=none")
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())["metrics"]
    assert {"images/psnr", "clips/psnr", "clips/ssim", "clips/bit_entropy_4"} <= metrics.keys()
    assert (metrics["images/bits_per_image"], metrics["clips/bits_per_image"]) == (4 * 4 * 16, 2 * 4 * 4 * 16)
    data = "data=video data.image_size=32 data.frames=5 data.num_workers=0"
    succeed(workspace, "encode", f"ckpt=runs/tokenizer_joint {data}")
    manifest = json.loads((workspace / "data" / "video_tokens" / "manifest.json").read_text())
    assert (manifest["token_shape"], manifest["views"]) == ([2, 4, 4], 2)
    assert manifest["splits"]["train"]["samples"] == 9


@full
@pytest.mark.parametrize("cluster", ["fsdp"])
def test_two_nodes_train_as_one_process(workspace, cluster):
    """Two times two processes; sharded within a node, a copy on each."""
    command = REFINER + " logger=csv scores=none name="
    if not (workspace / "runs" / "one_node").exists():
        succeed(workspace, "train", command + "one_node")
    arguments = command + f"two_nodes_{cluster} cluster={cluster} cluster.accelerator=cpu cluster.precision=32-true"
    arguments += " cluster.num_nodes=2 cluster.devices=2"
    arguments += " cluster.strategy.shard_size=2" if cluster == "fsdp" else ""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [grn(workspace, "train", arguments, background=True, processes=2, node=(i, port)) for i in range(2)]
    assert [node.wait(timeout=240) for node in nodes] == [0, 0]
    one, two = (checkpoint(workspace, name) for name in ("one_node", f"two_nodes_{cluster}"))
    assert one["global_step"] == two["global_step"] == 12
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=1e-3, atol=1e-4)


def test_a_gan_trains_in_two_processes(workspace):
    """Though images leave the temporal convolutions, and either loss the other network, without a gradient."""
    arguments = "+experiment=tokenizer_image training.gan_start=2 name=gan data=digits data.flip=false" + TINY
    succeed(workspace, "train", arguments + TWO_RANKS + " data.batch_size=20")
    contents = torch.load(workspace / "runs" / "gan" / "checkpoints" / "last.ckpt", weights_only=True)
    assert contents["global_step"] == 8
    assert len(contents["optimizer_states"]) == 2


def test_official_weights_are_exported_and_scored(workspace, golden, tmp_path):
    state = {k.removeprefix("state."): v for k, v in golden("tokenizer").items() if k.startswith("state.")}
    torch.save({"ema": state}, tmp_path / "HBQ_image_tokenizer_16dim_M4.ckpt")
    sizes = "tokenizer.model.latent_channels=4 tokenizer.model.dim=8 tokenizer.model.decoder_dim=8"
    official = f"ckpt={tmp_path}/HBQ_image_tokenizer_16dim_M4.ckpt tokenizer=official_image {sizes}"
    succeed(workspace, "export", f"{official} out={tmp_path}/ours")
    succeed(
        workspace,
        "evaluate",
        f"ckpt={tmp_path}/ours data=digits scores=digits_reconstruction out={tmp_path}/scores",
    )
    assert json.loads((tmp_path / "scores" / "metrics.json").read_text())["metrics"]["bits_per_image"] == 2 * 2 * 4 * 4
    succeed(workspace, "encode", f"{official} data=digits out={tmp_path}/tokens splits=[val]")
    assert (
        "nothing to do"
        in succeed(workspace, "encode", f"ckpt={tmp_path}/ours data=digits out={tmp_path}/tokens splits=[val]").stdout
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_to_type(tmp_path, monkeypatch, capsys, verb):
    with pytest.raises(SystemExit, check=lambda exit: not exit.code):
        grn_here(tmp_path, monkeypatch, verb, "--help")
    said = capsys.readouterr().out
    assert f"python -m grn.{verb}" in said
    assert "data" in said
    grn_here(tmp_path, monkeypatch, verb, "--cfg job")
    assert capsys.readouterr().out.strip()


TEXT = "+experiment=digits_t2i model.depth=2 model.width=32 model.heads=2 model.mlp_ratio=8 text_encoder.depth=1"
TEXT += " trainer.max_steps=6 trainer.val_check_interval=3 trainer.log_every_n_steps=1 training.warmup_steps=2"
TEXT += " callbacks.last.every_n_train_steps=3 callbacks.scores.num=100 callbacks.grid.num=10 data.max_tokens=1024"
TEXT += " sampler.schedule.max_steps=13 logger=csv"


@pytest.fixture(scope="module")
def captioned(workspace, built_once):
    """As the workspace, with prepared pairs of digits, and a text refiner that was trained for six steps."""

    def build(folder):
        for kept in ("data", "runs/digits_tokenizer", "runs/digits_c2i"):
            shutil.copytree(workspace / kept, folder / kept)
        succeed(folder, "prepare", "data=digits_t2i source.copies=8")
        succeed(folder, "train", TEXT)

    return built_once("captioned", build)


def test_a_text_refiner_trains_on_full_packs(captioned):
    run = captioned / "runs" / "digits_t2i"
    with open(run / "csv" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    packing = [float(row["train/packing"]) for row in rows if row["train/packing"]]
    assert len(packing) == 6
    assert sum(packing) / 6 >= 0.95
    last = next(row for row in rows if row["eval/pair_accuracy"])
    assert all(last[f"eval/pair_accuracy_{apart}"] for apart in ("shown", "heldout"))
    assert float(last["eval/judge_val_accuracy"]) > 0.95
    names = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {".".join(name.split(".")[:2]) for name in names} == {"network.refiner", "network.encoder"}
    assert (run / "pictures" / "samples-step0000006.png").is_file()
    assert (run / "pictures" / "refinement.gif").is_file()


@full
def test_a_text_refiner_goes_on_with_the_same_bits(captioned):
    command = TEXT + " scores=none trainer.max_steps=40 trainer.val_check_interval=40 name="
    succeed(captioned, "train", command + "whole_text")
    broken_off(captioned, command, "killed_text", lambda pid: os.kill(pid, signal.SIGKILL))
    assert 0 < checkpoint(captioned, "killed_text")["global_step"] < 40
    succeed(captioned, "train", command + "killed_text ckpt_path=last")
    assert_same_bits(checkpoint(captioned, "whole_text"), checkpoint(captioned, "killed_text"))


def test_a_text_refiner_is_asked_by_prompts(captioned, tmp_path):
    (tmp_path / "prompts.txt").write_text("a three left of an eight\n\na handwritten seven\n")
    arguments = "ckpt=runs/digits_t2i num=3 film=false"
    succeed(captioned, "sample", f"{arguments} prompts={tmp_path}/prompts.txt out={tmp_path}/file")
    prompts = "prompts=[a three left of an eight,a handwritten seven]"
    size = (f"out={tmp_path}/list", "height=32", "width=64")
    done = commands.run("grn.sample", *arguments.split(), *size, prompts, cwd=captioned)
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "list" / "samples.json").read_text())
    assert said["prompts"] == ["a three left of an eight", "a handwritten seven", "a three left of an eight"]
    pictures = [(tmp_path / name / "samples.png").read_bytes() for name in ("file", "list")]
    assert pictures[0] == pictures[1]
    succeed(captioned, "evaluate", "ckpt=runs/digits_t2i num=100")
    metrics = json.loads((captioned / "runs" / "digits_t2i" / "evaluation" / "metrics.json").read_text())["metrics"]
    assert {"pair_accuracy", "pair_accuracy_heldout", "left_accuracy", "steps_mean"} <= metrics.keys()


CLIPS = "data.num_workers=0 data.eval_batch_size=20 trainer.log_every_n_steps=1 logger=csv"


@full
def test_digits_move(workspace, tmp_path):
    """From mp4 shards by a joint tokenizer and its tokens to clips, and on from one of these."""
    succeed(workspace, "prepare", "data=digits_video source.digits=200 source.val=20 source.copies=1")
    tokenizer = f"+experiment=digits_video_tokenizer {CLIPS} trainer.max_steps=4 trainer.val_check_interval=4"
    tokenizer += " training.warmup_steps=2"
    succeed(workspace, "train", tokenizer + " model.dim=8 model.decoder_dim=8 callbacks.last.every_n_train_steps=4")
    succeed(workspace, "evaluate", "ckpt=runs/digits_video_tokenizer data.num_workers=0")
    scores = json.loads((workspace / "runs" / "digits_video_tokenizer" / "evaluation" / "metrics.json").read_text())
    assert {"psnr", "temporal_psnr"} <= scores["metrics"].keys()

    succeed(workspace, "encode", "ckpt=runs/digits_video_tokenizer data=digits_video num_workers=0")
    text = TEXT.replace("digits_t2i", "digits_t2v").replace("callbacks.scores.num=100", "callbacks.scores.num=60")
    succeed(workspace, "train", text.replace("callbacks.grid.num=10", "callbacks.grid.num=6") + f" {CLIPS}")
    run = workspace / "runs" / "digits_t2v"
    with open(run / "csv" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(next(row for row in rows if row["eval/motion_accuracy"])["eval/judge_val_accuracy"]) > 0.9
    assert min(float(row["train/packing"]) for row in rows if row["train/packing"]) > 0.85

    succeed(workspace, "sample", "ckpt=runs/digits_t2v num=2 frames=17")
    clips = sorted((run / "samples" / "videos").iterdir())
    assert [probe_video(clip.read_bytes(), "mp4").duration_s for clip in clips] == [pytest.approx(17 / 16)] * 2
    assert (run / "pictures" / "samples-step0000006.mp4").is_file()
    succeed(
        workspace, "sample", f"ckpt=runs/digits_t2v num=1 init={clips[0]} init_frames=5 film=false out={tmp_path}/on"
    )
    assert len(list((tmp_path / "on" / "videos").iterdir())) == 1


@full
def test_an_exported_text_refiner_is_scored_as_its_run(captioned):
    succeed(captioned, "export", "ckpt=runs/digits_t2i out=digits_t2i")
    scored = []
    of_run, scores = "runs/digits_t2i", "scores=digits_t2i"
    for ckpt in (of_run, f"{of_run} {scores}", f"digits_t2i data=digits_t2i {scores}"):
        out = f"scored_{len(scored)}"
        succeed(captioned, "evaluate", f"ckpt={ckpt} num=100 out={out}")
        scored.append(json.loads((captioned / out / "metrics.json").read_text())["metrics"] | {"seconds": 0})
    assert scored[0] == scored[1] == scored[2]


@full
@pytest.mark.parametrize("ranks", ["fsdp"])
def test_two_ranks_train_the_text_refiner_of_one(captioned, ranks):
    command = TEXT + " data.batch_size=2 data.rank_streams=2 callbacks.scores.num=100 name="
    succeed(captioned, "train", f"{command}text_{ranks}_one scores=none")
    succeed(captioned, "train", f"{command}text_{ranks}" + (TWO_RANKS if ranks == "ddp" else TWO_SHARDS))
    whole, found = checkpoint(captioned, f"text_{ranks}_one"), checkpoint(captioned, f"text_{ranks}")
    for key, weight in whole["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][key], weight, rtol=0, atol=1e-4)
    data = [c["loops"]["fit_loop"]["state_dict"]["combined_loader"] for c in (whole, found)]
    assert list(differences(*data)) == []


@pytest.mark.parametrize(
    ("verb", "arguments", "expected"),
    [
        ("sample", "ckpt=runs/digits_t2i prompts=/nowhere.txt out=o", "prompts: no file /nowhere.txt"),
        ("sample", "ckpt=runs/digits_t2i prompts=[] out=o", "at least one"),
        ("sample", "ckpt=runs/digits_t2i labels=[1] out=o", "takes texts"),
        ("sample", "ckpt=runs/digits_t2i width=30 out=o", "multiples of the tokenizer's stride 4"),
        ("sample", "ckpt=runs/digits_c2i frames=5 out=o", "frames is for text refiners"),
        ("sample", "ckpt=runs/digits_c2i prompts=[a] out=o", "give labels="),
        ("train", "+experiment=digits_t2i name=x logger=none text_encoder=none", "text_encoder=byt5_tiny"),
        ("train", TEXT + " name=x model.text_width=64", "model.text_width=64 does not fit"),
        ("train", "+experiment=digits_t2i name=x logger=none data=digits", "trains from captioned images"),
        ("train", TEXT + " name=x data.max_tokens=100", "data.max_tokens=100 holds no image of 32x64"),
        ("train", TEXT + " name=x prompt_list=none", "training.prompts is empty"),
        ("train", REFINER + " name=x data=digits_t2i", "packs are for text refiners"),
        ("train", TEXT + " ckpt_path=last data.lookahead=8", "data.lookahead=64"),
        ("train", TEXT + " name=x cluster=cpu cluster.compile=true", "cluster.compile=true does not go with a text"),
        ("evaluate", "ckpt=runs/digits_t2i device=cpu compile=true out=o", "compile=true does not go with a text"),
        ("encode", "ckpt=runs/digits_tokenizer data=digits_t2i text_encoder=byt5_tiny", "is trained along"),
        ("export", "ckpt=runs/digits_t2i format=official", "the authors' files have no text encoder"),
    ],
)
def test_mistakes_with_texts_take_one_line(captioned, monkeypatch, verb, arguments, expected):
    assert expected in mistaken(captioned, monkeypatch, verb, arguments)
