"""Who starts a run's processes, by the variables of SLURM and torchrun."""

import os

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from grn.runtime.errors import UserError
from grn.training.environment import check_started, cluster_environment

ALLOCATION = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NNODES": "1", "SLURM_NODELIST": "node1"}
FIRST = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


@pytest.fixture
def given(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
            monkeypatch.delenv(name)

    def give(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return give


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "kind"),
    [
        ({}, 2, 1, None),
        # A batch script that starts its own two processes; somebody else's allocation of eight tasks.
        (ALLOCATION | FIRST | {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}, 2, 1, LightningEnvironment),
        (ALLOCATION | FIRST | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, "auto", 1, LightningEnvironment),
        (ALLOCATION | {"SLURM_NTASKS": "8"}, 1, 1, LightningEnvironment),
        # srun started two.
        (
            ALLOCATION | FIRST | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2"},
            2, 1, SLURMEnvironment,
        ),
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"} | ALLOCATION, 2, 1, None),
        (ALLOCATION | {"SLURM_NTASKS": "1", "NODE_RANK": "1"}, 2, 2, LightningEnvironment),
    ],
)  # fmt: skip
def test_srun_alone_makes_slurm_processes(given, variables, devices, nodes, kind):
    given(**variables)
    assert [type(it) for it in cluster_environment(devices, nodes)] == ([] if kind is None else [kind])


def test_nodes_that_nobody_started(given):
    given(**ALLOCATION, SLURM_NTASKS="2")
    with pytest.raises(UserError, match=r"cluster\.num_nodes=2, .* `srun --nodes=2 --ntasks-per-node=8`"):
        cluster_environment(8, 2)


def test_tasks_that_lightning_does_not_take(given):
    given(**ALLOCATION, **FIRST, SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="8")
    with pytest.raises(UserError, match="--ntasks-per-node=8") as refused:
        cluster_environment(8, 1)
    assert "\n" not in str(refused.value)


def test_another_number_of_processes_than_devices(given):
    check_started(2, 4)
    given(RANK="0", LOCAL_RANK="0", WORLD_SIZE="8")
    check_started(2, 4)
    with pytest.raises(UserError, match=r"8 processes were started, but cluster\.devices=2 times"):
        check_started(2, 1)
