"""A lock for one writer per folder, released when its process ends; cleans up after killed writers.

`fcntl.lockf` takes locks that network file systems know (NFS, Lustre with -o flock, GPFS), too, and that forked workers
do not inherit: the lock of a killed process is free at once, also while its workers are still about to notice. (The
library `filelock` takes `flock`, which they do inherit, and does not tell whose a lock is.)
"""

import errno
import fcntl
import logging
import os
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from grn.runtime.errors import UserError
from grn.runtime.files import remove_leftovers, write_atomically

log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of file systems without any
PATIENCE = 2  # seconds, for a process that is just being killed
PATIENCE_OF_REQUEUED = 120  # that SLURM starts again: the node before may still be ending the job, or be gone


@contextmanager
def only_writer(path: Path, *, inside: bool, remedy: str, patience: float | None = None) -> Iterator[None]:
    """Within, no other process has this; what killed writers left of it is removed first.

    Args:
        path: a folder, or a file.
        inside: the lock is in the folder, `.lock`, and temporary files in it and its subfolders are leftovers, unless
            they have a lock of their own; else the lock is beside `path`, and temporary files of its name are.
        remedy: what else to do than to wait, for the message.
        patience: seconds for which another process is waited for; None: a moment, after SLURM's requeue longer.

    Raises:
        UserError: another process has it, and the line says which, and where; or what is there is no file.
        OSError: the lock cannot be made, or is a link.
    """
    lock = path / ".lock" if inside else path.parent / f".{path.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _take(lock, path, remedy, patience)
    try:
        if inside:
            for folder in (path, *(it for it in path.iterdir() if it.is_dir() and not (it / ".lock").exists())):
                remove_leftovers(folder)
        else:
            for name in (path.name, f".{path.name}.partial"):  # as `grn.data.prepare.partial` calls it
                remove_leftovers(path.parent, of=name)
        yield
    finally:
        lock.unlink(missing_ok=True)  # before it is let go: who waits for it sees that it is another file's
        os.close(descriptor)


def writer_of(folder: Path) -> str | None:
    """Who has `only_writer(folder, inside=True)` now, as its lock says; None where nobody has, or no lock tells.

    Takes nothing from others and waits for nobody, but must not be called by the process that has it itself: its lock
    would be lost.
    """
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        told = " ".join(os.pread(descriptor, 300, 0).decode("utf-8", "replace").split())
        return "".join(filter(str.isprintable, told)) or "another process"
    else:
        return None
    finally:
        os.close(descriptor)


def write_cached(path: Path, write: Callable[[Path], object]) -> Path:
    """As `write_atomically`, of a file that other runs and ranks may be writing at the same time, too."""
    with only_writer(path, inside=False, remedy="try again", patience=600):
        return write_atomically(path, write)


def _take(lock: Path, path: Path, remedy: str, patience: float | None) -> int:
    """The descriptor of the lock file, to be kept open."""
    if patience is None:
        patience = PATIENCE_OF_REQUEUED if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else PATIENCE
    deadline = time.monotonic() + patience
    told = False
    while True:
        # Of a folder that may be somebody else's: what a link leads to would be emptied.
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UserError(f"{lock} is no plain file, and so no lock: remove it")
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                log.warning("%s: this file system has no locks; nobody notices a second process that writes here", lock)
                return descriptor
            holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            if time.monotonic() > deadline:
                raise UserError(f"{path} is being written by {holder}: wait until that is done, or {remedy}") from None
            if not told:
                log.info("waiting for %s, which is being written by %s", path, holder)
                told = True
            time.sleep(0.2)
            continue
        if _is(lock, descriptor):
            break
        os.close(descriptor)  # whoever had it before has removed it meanwhile
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    command = Path(sys.argv[0]).name[:40]
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} ({command}, since {started})\n".encode(), 0)
    return descriptor


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
