"""Mistakes that commands find before they start."""

import errno
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from grn import bench, sample, train
from grn.cli.checks import check_cluster
from grn.cli.entry import entry_point
from grn.runtime.errors import UserError


def line_of(monkeypatch, main, *arguments):
    """What a command ends with on stderr."""
    monkeypatch.setattr(sys, "argv", ["grn.train", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert isinstance(exit.value.code, str)
    assert "\n" not in exit.value.code
    return exit.value.code


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model.depth=2", "model.depth=3"),
        ("+data.extra=1", "data.extra=2"),
        ("cluster=cpu", "cluster=ddp"),
        ("ckpt_path=a=b", "++ckpt_path=a=c"),
    ],
)
def test_a_key_that_is_set_twice(monkeypatch, first, second):
    line = line_of(monkeypatch, train.main, "+experiment=digits_c2i", first, "seed=1", second)
    assert line.endswith(f" is set twice, by {first} and by {second}: leave one out")


def test_a_group_is_never_null(monkeypatch):
    line = line_of(monkeypatch, train.main, "+experiment=digits_c2i", "logger=null")
    assert line.startswith("error: logger=null: logger is a group of options, choose one of aim, comet, csv, ")
    assert ", none, " in line


def test_a_full_disk_under_any_file(monkeypatch, tmp_path):
    @entry_point("bench")
    def main(config):
        raise OSError(errno.ENOSPC, "No space left on device")

    line = line_of(monkeypatch, main, f"hydra.run.dir={tmp_path}/run")
    assert line.startswith(f"error: {tmp_path}/run: no space is left on its disk")


@pytest.mark.parametrize(
    ("launcher", "arguments", "told"),
    [
        (
            "hydra_plugins.hydra_submitit_launcher.submitit_launcher",
            ["cluster=slurm_1x8"],
            "cluster=slurm... submits by hydra-submitit-launcher: pip install 'grn[cluster]'",
        ),
        pytest.param(
            "hydra_plugins.hydra_joblib_launcher.joblib_launcher",
            ["-m", "hydra/launcher=parallel", "seed=0,1"],
            "hydra/launcher=parallel needs hydra-joblib-launcher: pip install 'grn[joblib]'",
            marks=pytest.mark.full,
        ),
    ],
)
def test_launchers_without_their_extra(tmp_path, launcher, arguments, told):
    """What a missing package means is said, not the plugin's name; in a process of its own, since Hydra looks once."""
    arguments = ["grn.train", *arguments, f"paths.runs={tmp_path}"]
    code = f"import sys; sys.modules['{launcher}'] = None; sys.argv = {arguments}; from grn import train; train.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, f"error: {told}\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model.depth=a=b"], "model.depth=a=b cannot be read: quote what is a text, in the shell, too: 'model.depth="),
        (["+own.key=é"], "+own.key=é cannot be read: quote what is a text, in the shell, too: '+own.key=\"...\"'"),
        (["seed=1,2"], "seed=1,2 may be a list (seed=[...]), a sweep (add -m) or a text ('seed=\"...\"'): say which"),
        (["--bogus"], "unrecognized arguments: --bogus; --help lists what there is"),
        (["-seed=3"], "unrecognized arguments: -seed=3: keys have no dashes, seed=..."),
        (["--cfg", "nothing"], "argument --cfg/-c: invalid choice: 'nothing'"),
    ],
)
def test_what_the_grammar_does_not_take(monkeypatch, arguments, expected):
    line = line_of(monkeypatch, train.main, "+experiment=digits_c2i", *arguments)
    assert line.startswith(f"error: {expected}")


@pytest.mark.parametrize(
    ("main", "arguments", "told"),
    [
        (train.main, ["+experiment=digits_c2i", "training.learning_rate=inf"], "training.learning_rate=inf"),
        (train.main, ["+experiment=digits_c2i", "training.betas=[0.9,nan]"], "training.betas[1]=nan"),
        (train.main, ["+experiment=digits_c2i", "callbacks.ema.decays=[-inf]"], "callbacks.ema.decays[0]=-inf"),
        (sample.main, ["ckpt=x", "sampler.guidance=NaN"], "sampler.guidance=nan"),
        (bench.main, ["+a={b:[1,inf]}"], "a.b[1]=inf"),
    ],
)
def test_numbers_of_a_config_are_finite(monkeypatch, tmp_path, main, arguments, told):
    monkeypatch.setenv("GRN_RUNS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    line = line_of(monkeypatch, main, *arguments)
    assert line == f"error: {told} must be a finite number"


def test_an_argument_of_several_lines_is_told_in_one(monkeypatch):
    line = line_of(monkeypatch, train.main, "+experiment=digits_c2i", "+own.key={a\nb: http://u:p@host/x?key=1")
    assert line.startswith("error: +own.key={a; b: http://***@host/x?*** cannot be read")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data.root=nothing"], "error: data.train: no shards at nothing/train-*.tar"),
        (["training.learning_rate=-1"], "error: training.learning_rate=-1 must be a number of at least"),
        (["training.betas=[0.9,1]"], "error: training.betas=[0.9, 1] must be two numbers"),
        (["cluster=gpu"], "error: cluster.accelerator=gpu: there is no GPU here; cluster=auto takes"),
        (
            ["cluster.accelerator=quantum"],
            "error: cluster.accelerator=quantum must be one that Lightning has, such as auto, gpu, cpu, ",
        ),
        (["cluster.strategy=dpd"], "error: cluster.strategy=dpd must be one that Lightning has, such as auto, ddp, "),
        (["trainer.max_steps=-5"], "error: trainer.max_steps must be a whole number of at least 1, or -1 for no end"),
        (["trainer.max_steps=0"], "error: trainer.max_steps must be a whole number of at least 1, or -1 for no end"),
    ],
)
def test_a_start_that_fails_leaves_no_run_folder(monkeypatch, tmp_path, arguments, told):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: False)
    for name in ("runs/.keep", "digits/train-000000.tar", "digits/val-000000.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    own = [f"paths.runs={tmp_path}/runs", f"paths.data={tmp_path}", "logger=none"]
    line = line_of(monkeypatch, train.main, "+experiment=digits_tokenizer", *own, *arguments)
    assert line.startswith(told)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".keep"]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("precision", "fp8", "one of 32-true, bf16-mixed, "),
        ("precision", None, "one of 32-true, "),
        ("matmul_precision", "low", "one of highest, high, medium"),
        *(
            ("devices", value, "auto, a number of at least 1, or a list")
            for value in (0, -2, 1.5, True, "x", ",", [], [-1])
        ),
        ("num_nodes", 0, "a whole number, at least 1"),
    ],
)
def test_what_a_cluster_cannot_be(key, value, told):
    config = OmegaConf.create({"cluster": {key: value}})
    with pytest.raises(UserError, match=rf"^cluster\.{key}=.* must be {told}"):
        check_cluster(config, None)


def test_what_a_cluster_may_be():
    running = OmegaConf.create({"job": {"config_name": "train"}, "runtime": {"choices": {}}})
    for devices in ("auto", -1, "-1", 2, "2", "0,1", "0,", "1,", [0, 2]):
        check_cluster(OmegaConf.create({"cluster": {"devices": devices, "precision": 32}}), running)
