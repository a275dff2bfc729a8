"""Ctrl-C, SIGTERM and SIGHUP: a stopped command ends with one line and the usual exit status."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from grn.runtime.ranks import place

# Ctrl-C; what SLURM, torchrun and kill send; a terminal that was closed.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
AGAIN = 1.0  # seconds after which a second Ctrl-C is the user's, where a launcher passes on the first one, too


class Interrupted(KeyboardInterrupt):
    """A command was told to stop.

    Args:
        received: the signal's number.
        kept: what of its work is kept, and how to go on.
    """

    def __init__(self, received: int, kept: str | None = None):
        super().__init__()
        self.received, self.kept = received, kept

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.received).name}" + (f": {self.kept}" if self.kept else "")


def end_at_once() -> None:
    """What a second Ctrl-C does: nothing is saved, nothing is waited for."""
    if place()[0] == 0:
        os.write(2, b"\nended at once\n")  # printing is not safe within a signal's handler
    os._exit(128 + signal.SIGINT)


@contextmanager
def stops_on_signals() -> Iterator[None]:
    """Within it, `STOPPING` raise `Interrupted`, which leaves it as one line on stderr and the status 128 + signal.

    A second Ctrl-C ends the process at once. Signals that are ignored, as under nohup, stay so.
    """
    if threading.current_thread() is not threading.main_thread():  # others may not handle signals
        yield
        return
    stopping = False

    def stop(received: int, _: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            if received == signal.SIGINT:
                end_at_once()
            return  # while what was begun is closed
        stopping = True
        raise Interrupted(received)

    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
        yield
    except Interrupted as stopped:
        if place()[0] == 0:
            print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
