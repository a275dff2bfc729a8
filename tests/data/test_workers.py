"""Who may end a loader's worker."""

import multiprocessing
import os
import signal
import time

import pytest

from grn.data.stream.workers import outlive_sigterm

pytestmark = pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="no sigwaitinfo on this system")


def _worker(pipe):
    outlive_sigterm(0)
    pipe.send("ready")
    while True:
        pipe.send(pipe.recv())


def test_only_the_parent_ends_a_worker():
    context = multiprocessing.get_context("fork")
    pipe, other = context.Pipe()
    worker = context.Process(target=_worker, args=(other,), daemon=True)
    worker.start()
    other.close()
    assert pipe.recv() == "ready"

    stranger = context.Process(target=os.kill, args=(worker.pid, signal.SIGTERM))
    stranger.start()
    stranger.join()
    time.sleep(0.05)
    pipe.send("still there")
    assert pipe.poll(60), f"the worker is gone: {worker.exitcode}"
    assert pipe.recv() == "still there"

    worker.terminate()
    worker.join(timeout=60)
    assert worker.exitcode == 0
