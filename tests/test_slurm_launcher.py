"""What `cluster=slurm_...` would submit: shown by `cluster.dry_run=true`, where there is no SLURM, too."""

import importlib
import sys

import pytest

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'grn[cluster]'")


def dry_run(monkeypatch, capsys, folder, verb, *arguments):
    """(The folders of the points, the batch script: lines that sbatch reads)."""
    monkeypatch.setenv("PATH", str(folder))  # without srun
    given = ["cluster.dry_run=true", f"paths.runs={folder}", f"paths.data={folder}/data", *arguments]
    monkeypatch.setattr(sys, "argv", [f"grn.{verb}", *given])
    importlib.import_module(f"grn.{verb}").main()
    lines = capsys.readouterr().out.splitlines()
    points = [line for line in lines if line.startswith(f"# {folder}/")]
    return [line.partition(":")[0].removeprefix(f"# {folder}/") for line in points], points, lines


def training(monkeypatch, capsys, folder, *arguments):
    return dry_run(monkeypatch, capsys, folder, "train", "+experiment=c2i_ind_L", "tokenizer.ckpt=x", *arguments)


def test_one_run_is_one_job_in_its_run_folder(monkeypatch, capsys, tmp_path):
    own = ["cluster.partition=gpu", "cluster.account=me", "cluster.time=90", "+cluster.sbatch.reservation=r"]
    folders, _, lines = training(monkeypatch, capsys, tmp_path, "cluster=slurm_2x8", *own)
    assert folders == ["c2i_ind_L"]
    asked = ["nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "partition=gpu", "account=me", "time=90"]
    asked += ["requeue", "reservation=r", "signal=USR2@300", "job-name=grn_c2i_ind_L"]
    asked += [f"output={tmp_path}/c2i_ind_L/slurm/%j_0_log.out"]
    assert {f"#SBATCH --{option}" for option in asked} <= set(lines)
    assert not any(line.startswith("#SBATCH --array") for line in lines)
    (command,) = [line for line in lines if line.startswith("srun ")]
    assert "--kill-on-bad-exit=1" in command
    assert command.endswith(f"-m submitit.core._submit {tmp_path}/c2i_ind_L/slurm")
    assert not list(tmp_path.rglob("*.pkl"))


def test_a_sweep_is_one_array(monkeypatch, capsys, tmp_path):
    own = ["cluster=slurm_1x8", "seed=1,2,3", "cluster.setup=[module load x]", "cluster.at_once=2"]
    folders, points, lines = training(monkeypatch, capsys, tmp_path, *own)
    assert folders == [f"sweeps/c2i_ind_L/{number}" for number in range(3)]
    assert all(f"seed={number + 1} " in point for number, point in enumerate(points))
    assert lines.count("#!/bin/bash") == lines.count("module load x") == 1
    assert "#SBATCH --array=0-2%2" in lines
    assert f"#SBATCH --output={tmp_path}/sweeps/c2i_ind_L/slurm/%A_%a_0_log.out" in lines


@pytest.mark.parametrize(
    ("verb", "arguments", "folder", "asked"),
    [
        (
            "prepare",
            "data=digits cluster=slurm_cpu cluster.num_nodes=4 cluster.cpus_per_task=32",
            "prepare",
            [4, 1, 32],
        ),
        ("encode", "data=digits ckpt=x cluster=slurm_2x8", "encode", [2, 8, 8]),
        ("calibrate", "ckpt={}/run/last.ckpt target_steps=9 cluster=slurm_1x8", "run/calibration", [1, 8, 8]),
        ("evaluate", "ckpt={}/run/last.ckpt cluster=slurm_1x8", "run/evaluation", [1, 8, 8]),
        ("sample", "ckpt={}/run/last.ckpt cluster=slurm", "run/samples", [1, 1, 8]),
    ],
)
def test_other_commands_are_jobs_in_their_folders(verb, arguments, folder, asked, monkeypatch, capsys, tmp_path):
    folders, _, lines = dry_run(monkeypatch, capsys, tmp_path, verb, *arguments.format(tmp_path).split())
    assert folders == [folder]
    options = dict(zip(("nodes", "ntasks-per-node", "cpus-per-task"), asked)) | {"job-name": f"grn_{verb}"}
    assert {f"#SBATCH --{name}={value}" for name, value in options.items()} <= set(lines)
    assert ("#SBATCH --gpus-per-node" in "".join(lines)) == (verb != "prepare")
    assert f"#SBATCH --output={tmp_path}/{folder}/slurm/%j_0_log.out" in lines


@pytest.mark.parametrize(
    ("verb", "arguments", "told"),
    [
        ("evaluate", ["ckpt=x", "cluster=ddp"], "cluster=ddp says how to train: grn.evaluate takes cluster=slurm, "),
        ("encode", ["ckpt=x", "cluster=slurm", "cluster.precision=bf16"], "cluster.precision says how to train"),
        ("sample", ["ckpt=x", "cluster=slurm_1x8"], "grn.sample is one process, and each of 8 would draw all"),
        ("train", ["cluster=none"], "cluster=none is not for grn.train: choose cluster=auto"),
    ],
)
def test_what_a_command_has_no_use_for(verb, arguments, told, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"grn.{verb}", *arguments, f"paths.runs={tmp_path}"])
    with pytest.raises(SystemExit, match=f"^error: {told}"):
        importlib.import_module(f"grn.{verb}").main()
