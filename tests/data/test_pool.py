"""Worker processes: what they are told, how they end, and that they never outlive the one that started them."""

import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from grn.data.prepare.pool import check_stopped, run_jobs
from grn.runtime.errors import UserError


class Work:
    """Says which process did a job; some jobs go wrong."""

    def __init__(self, folder=None):
        self.folder, self.index, self.starts = folder, None, 0

    def start_worker(self, index):
        self.index, self.starts = index, self.starts + 1

    def __call__(self, job):
        if job == "mistake":
            while not (self.folder / "started").exists():
                time.sleep(0.01)
            raise UserError("data.root: full")
        if job == "die":
            os._exit(9)
        if job == "long":
            (self.folder / "started").touch()
            try:
                while True:
                    check_stopped()
                    time.sleep(0.01)
            except Exception:
                (self.folder / "stopped").touch()
                raise
        return job, os.getpid(), self.index, self.starts


def test_every_job_is_done_and_every_process_is_started_once():
    results = list(run_jobs(Work(), range(20), num_workers=2))
    assert sorted(job for job, *_ in results) == list(range(20))
    indices = {pid: index for _, pid, index, _ in results}
    assert os.getpid() not in indices
    assert sorted(indices.values()) == list(range(len(indices)))
    assert {starts for *_, starts in results} == {1}


def test_without_workers_all_happens_here_in_order():
    results = list(run_jobs(Work(), range(3), num_workers=0))
    assert results == [(job, os.getpid(), None, 0) for job in range(3)]


def test_a_mistake_ends_the_others(tmp_path):
    with pytest.raises(UserError, match=r"^data\.root: full$"):
        list(run_jobs(Work(tmp_path), ["long", "mistake"], num_workers=2))
    assert (tmp_path / "stopped").exists()


def test_closing_ends_what_is_in_progress(tmp_path):
    with closing(run_jobs(Work(tmp_path), [1, "long", "long"], num_workers=1)) as results:
        assert next(results)[0] == 1
    assert not [process for process in children() if "spawn_main" in process]


def test_a_killed_worker_is_one_line():
    with pytest.raises(UserError, match=r"worker process was killed .*num_workers=1"):
        list(run_jobs(Work(), ["die"] * 2, num_workers=2))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at processes in /proc")
def test_workers_end_with_the_process_that_started_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_pool import Work\n"
        "from grn.data.prepare.pool import run_jobs\n"
        "if __name__ == '__main__':\n"
        "    for _, pid, *_ in run_jobs(Work(Path(sys.argv[1])), [1, 'long'], num_workers=1): print(pid, flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        worker = int(process.stdout.readline())
        assert running(worker)
        process.kill()
    deadline = time.monotonic() + 30
    while running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(worker)


def running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def children():
    commands = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"PPid:\t{os.getpid()}\n" in status.read_text():
                commands.append((status.parent / "cmdline").read_text())
        except OSError:
            continue
    return commands
