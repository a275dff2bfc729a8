"""Timeouts for downloads by other libraries."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT = 30.0  # seconds without a byte


@contextmanager
def impatient(seconds: float = TIMEOUT) -> Iterator[None]:
    """Gives torch's downloads, which wait for ever, a timeout: compute nodes often drop packets silently."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
