"""A pool of worker processes that end promptly and never outlive their parent."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from grn.data.stream.workers import outlive_sigterm
from grn.runtime.errors import UserError
from grn.runtime.interruption import STOPPING


class Stopped(Exception):
    """The other jobs are over: nobody waits for this one."""


def run_jobs(work: Callable[[Any], Any], jobs: Sequence[Any], *, num_workers: int) -> Generator[Any]:
    """`work(job)` for every job; the results come as they are ready. Close the iterator to end early.

    Args:
        work: pickled once per process, so it may keep what it builds at its first job. Where it has a method
            `start_worker(index)`, this is called once in each process, with 0 ... num_workers-1, before its first job.
            Long work calls `check_stopped()` now and then.
        jobs: picklable.
        num_workers: processes (spawned); 0: all happens in this one, without `start_worker`.

    Raises:
        UserError: a process was killed. What `work` raises is raised here, and ends the other jobs.
    """
    if num_workers == 0 or not jobs:
        yield from map(work, jobs)
        return
    context = multiprocessing.get_context("spawn")
    stop, started = context.RawValue("b", 0), context.Value("i", 0)
    pool = ProcessPoolExecutor(min(num_workers, len(jobs)), context, _start_process, (work, stop, started))
    try:
        with _held_back():  # by the processes that start here, too, until they know what to do with them
            futures = [pool.submit(_run_job, job) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was killed (out of memory?): run again with num_workers={max(1, num_workers // 2)}; "
            "what is finished is kept"
        ) from None
    finally:
        stop.value = 1
        pool.shutdown(cancel_futures=True)


@contextmanager
def _held_back() -> Iterator[None]:
    """Signals that end a command come after its body."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_stopped() -> None:
    """Raises `Stopped` in a worker process whose jobs are no longer wanted."""
    if _process is not None and _process.stop.value:
        raise Stopped


class _Process:
    """What a worker process knows."""

    def __init__(self, work: Callable[[Any], Any], stop: Any, started: Any):
        self.work, self.stop, self.started = work, stop, started
        self.index: int | None = None

    def run(self, job: Any) -> Any:
        if self.index is None:  # here and not as the process starts, whose errors a pool does not pass on
            with self.started.get_lock():
                index, self.started.value = self.started.value, self.started.value + 1
            if hasattr(self.work, "start_worker"):
                self.work.start_worker(index)
            self.index = index
        check_stopped()
        return self.work(job)


_process: _Process | None = None


def _start_process(*arguments: Any) -> None:
    global _process
    _process = _Process(*arguments)
    outlive_sigterm(0)  # Ctrl-C and its like reach all processes; the first one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # of the pool
    parent.join()
    os._exit(1)


def _run_job(job: Any) -> Any:
    assert _process is not None  # `_start_process` has run in this one
    return _process.run(job)
