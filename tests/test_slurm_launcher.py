"""What `cluster=slurm_...` would submit: shown by `cluster.dry_run=true`, where there is no SLURM, too."""

import sys

import pytest

from grn import train

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'grn[cluster]'")


def dry_run(monkeypatch, capsys, folder, *arguments):
    """The batch scripts: {folder of the point: [lines that sbatch reads]}."""
    monkeypatch.setenv("PATH", str(folder))  # without srun
    given = ["+experiment=c2i_ind_L", "tokenizer.ckpt=x", "cluster.dry_run=true", f"paths.runs={folder}", *arguments]
    monkeypatch.setattr(sys, "argv", ["grn.train", *given])
    train.main()
    scripts = capsys.readouterr().out.split("# " + str(folder) + "/")[1:]
    return {script.partition(":")[0]: script.splitlines() for script in scripts}


def test_one_run_is_one_job_in_its_run_folder(monkeypatch, capsys, tmp_path):
    own = ["cluster.partition=gpu", "cluster.account=me", "cluster.time=90", "+cluster.sbatch.reservation=r"]
    scripts = dry_run(monkeypatch, capsys, tmp_path, "cluster=slurm_2x8", *own)
    assert list(scripts) == ["c2i_ind_L"]
    lines = scripts["c2i_ind_L"]
    asked = ["nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "partition=gpu", "account=me", "time=90"]
    asked += ["requeue", "reservation=r", "signal=USR2@300", "job-name=grn_c2i_ind_L"]
    asked += [f"output={tmp_path}/c2i_ind_L/slurm/%j_0_log.out"]
    assert {f"#SBATCH --{option}" for option in asked} <= set(lines)
    (command,) = [line for line in lines if line.startswith("srun ")]
    assert command.endswith(f"-m submitit.core._submit {tmp_path}/c2i_ind_L/slurm")
    assert not list(tmp_path.rglob("*.pkl"))


def test_a_sweep_is_a_job_a_point(monkeypatch, capsys, tmp_path):
    scripts = dry_run(monkeypatch, capsys, tmp_path, "cluster=slurm_1x8", "seed=1,2", "cluster.setup=[module load x]")
    assert list(scripts) == ["sweeps/c2i_ind_L/0", "sweeps/c2i_ind_L/1"]
    for number, lines in enumerate(scripts.values()):
        assert f"seed={number + 1}" in lines[0]
        assert f"#SBATCH --output={tmp_path}/sweeps/c2i_ind_L/{number}/slurm/%j_0_log.out" in lines
        assert "module load x" in lines
