import json
import os

import commands
import pytest
import torch

from grn.runtime.errors import UserError
from grn.runtime.ranks import LAUNCHERS, gather, join, together


def test_alone_nothing_is_shared(monkeypatch):
    for name in sum(LAUNCHERS, ()):
        monkeypatch.delenv(name, raising=False)
    assert join(torch.device("cpu")) == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    assert gather("x") == ["x"]
    with pytest.raises(ValueError, match="of its own"), together():
        raise ValueError("of its own")


def test_one_accelerator_for_several_processes(monkeypatch):
    for name, value in zip(LAUNCHERS[0], ("1", "1", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"device=cuda:1 is one accelerator.*device=cuda "):
        join(torch.device("cuda:1"))


def run_rank(rank, folder):
    """As srun starts it; every rank writes down what it sees."""
    os.environ |= dict(zip(LAUNCHERS[1], (str(rank), str(rank), "3")))
    os.environ |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getppid()), "SLURM_STEP_ID": "0"}
    join(torch.device("cpu"))
    join(torch.device("cpu"))  # as a sweep's next point does
    seen = {"gathered": gather({"rank": rank})}
    for failing in ([], [1], [1, 2], [0, 1, 2]):
        try:
            with together():
                if rank in failing:
                    raise UserError(f"key{rank}: wrong")
        except UserError as error:
            seen[str(failing)] = str(error)
    try:
        with together():
            if rank == 2:
                raise ValueError("a bug")
    except Exception as error:
        seen["bug"] = f"{type(error).__name__} {error}"
    (folder / f"{rank}.json").write_text(json.dumps(seen))


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all(tmp_path):
    commands.spawn(run_rank, (tmp_path,), nprocs=3)
    for rank in range(3):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen.pop("gathered") == [{"rank": r} for r in range(3)]
        own = f"key{rank}: wrong"
        assert seen == {
            "[1]": own if rank == 1 else "rank 1: key1: wrong",
            "[1, 2]": own if rank in (1, 2) else "rank 1: key1: wrong",
            "[0, 1, 2]": own,
            "bug": "ValueError a bug" if rank == 2 else "UserError rank 2: a bug",
        }
