"""Ends the worker processes of loaders when a run stops."""

import os
import signal
import threading


def outlive_sigterm(worker_id: int) -> None:
    """For `worker_init_fn`: from now on only the parent's SIGTERM ends this worker, as loaders send it at their end.

    SLURM sends SIGTERM to every process of a job, and a worker that died of it would take the run with it before the
    step is saved; so does a terminal with Ctrl-C, or as it closes. A worker whose parent is gone ends by itself.
    SIGUSR2, SLURM's warning of a job's end, is ignored.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where there is no SLURM either
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # by it submitit queues a job again: not here, too
        # Libraries may have started threads in this process as it was forked, which do not block the signal
        # (OpenTelemetry's, by W&B or MLflow): one that they get is lost, where it would end all of it.
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
