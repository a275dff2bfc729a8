"""How a SLURM job is queued again after its run has saved."""

import signal
import time

# What SLURM sends before the end of a job's time, where submitit runs it, which then has a handler that queues the job
# again.
REQUEUE = signal.SIGUSR2


GRACE = 600  # seconds at most in which SLURM kills what it preempts


def requeue(received: int) -> None:
    """After a run that `received` this signal has saved: queues its SLURM job again, and does not return.

    It returns where submitit does not run the job. Of a SIGTERM, SLURM alone knows what it means: it kills the job, and
    if it preempts it, queues it again; but not one that ended by itself meanwhile. So that is waited for.
    """
    if received not in (signal.SIGTERM, REQUEUE) or not _is_requeued():
        return
    if received == signal.SIGTERM:
        time.sleep(GRACE)  # a SIGUSR2 that follows ends it
    else:
        signal.raise_signal(REQUEUE)


def _is_requeued() -> bool:
    return callable(signal.getsignal(REQUEUE))
