"""Who may end a loader's worker."""

import multiprocessing
import signal
import subprocess
import threading
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
    context = multiprocessing.get_context("spawn")  # without the threads that other tests' libraries have started here
    pipe, other = context.Pipe()
    worker = context.Process(target=_worker, args=(other,), daemon=True)
    worker.start()
    other.close()
    assert pipe.recv() == "ready"

    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    time.sleep(0.05)
    pipe.send("still there")
    assert pipe.poll(60), f"the worker is gone: {worker.exitcode}"
    assert pipe.recv() == "still there"

    worker.terminate()
    worker.join(timeout=60)
    assert worker.exitcode == 0


def _worker_with_a_thread(pipe):
    """As of a library that starts one in every process that is forked."""
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    _worker(pipe)


def test_threads_of_libraries_do_not_end_it_either():
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    worker = context.Process(target=_worker_with_a_thread, args=(other,), daemon=True)
    worker.start()
    other.close()
    assert pipe.recv() == "ready"
    for _ in range(20):
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    pipe.send("still there")
    assert pipe.poll(60), f"the worker is gone: {worker.exitcode}"
    assert pipe.recv() == "still there"
    worker.kill()
    worker.join(timeout=60)
