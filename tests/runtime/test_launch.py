import pytest

from grn.runtime.errors import UserError
from grn.runtime.ranks import LAUNCHERS, place


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 0, 1)),
        ({"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}, (9, 1, 16)),
        ({"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16"}, (9, 1, 16)),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}, (0, 0, 1)),  # sbatch without srun
    ],
)
def test_place(monkeypatch, environment, expected):
    for name in sum(LAUNCHERS, ()):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place() == expected


@pytest.mark.parametrize("rank", ["abc", "-1", "2", ""])
def test_what_no_launcher_sets(rank, monkeypatch):
    for name, value in {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^RANK={rank}, LOCAL_RANK=0, WORLD_SIZE=2 are no rank"):
        place()
