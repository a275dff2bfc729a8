"""`python -m grn.…` for tests, without the seconds of importing torch: processes forked from one that has imported it.

    done = run("grn.train", "+experiment=digits_c2i", cwd=folder)      # as subprocess.run
    running = Command("grn.train", "+experiment=digits_c2i", cwd=folder)  # as subprocess.Popen, in a session of its own
    spawn(function, arguments, nprocs=2)                               # as torch.multiprocessing.spawn

A server (`serve`) imports everything once and computes nothing, so that it has a single thread; for each command it
forks, and the child becomes what `python -m` would have started: own session and process group, working folder,
environment, `sys.argv`, `__main__`, stdout and stderr; it ends as any interpreter does, so its exit status and what
signals do to it are the real ones. Its `sys.executable` is a script (`shim`) that asks the same server: ranks that
Lightning or torchrun start are forked, too. Whatever a client leaves behind is killed when it goes.

What is the same in all these processes and is not in real ones: the seed of `hash`, and what is read from the
environment when modules are imported. Tests of imports and of such variables start an interpreter (`sys.executable`).
"""

import contextlib
import gc
import importlib
import os
import pickle
import pkgutil
import runpy
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
# Environment variables that conftest.py sets: the folder of this test run's server, and who runs the tests.
FOLDER, TESTER = "GRN_TESTS_SERVER", "GRN_TESTS_PID"
FORKED = ("grn", "torch.distributed.run")  # modules, or packages, that are run in forked processes
SHIM = """#!{python} -IS
import sys
sys.path.insert(0, {tests!r})
import commands
commands.shim({python!r}, {folder!r})
"""


# What tests use.


class Command:
    """`python -m module *arguments`, running. Of `subprocess.Popen`: `pid` (leads a process group), poll, wait, kill.

    Args:
        cwd: its working folder.
        env: its environment; that of this process if None.
    """

    def __init__(self, module, *arguments, cwd=".", env=None):
        self._start(env, module=module, argv=[str(argument) for argument in arguments], cwd=os.path.abspath(cwd))

    @classmethod
    def calling(cls, function, *arguments):
        """`function(*arguments)`, of a module that can be imported."""
        self = cls.__new__(cls)
        self._start(None, call=pickle.dumps((function, arguments)), path=sys.path, cwd=os.getcwd())
        return self

    def _start(self, env, **asked):
        self.returncode = None
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        asked["env"] = dict(os.environ if env is None else env)
        with open(os.devnull) as nothing:
            self._connection = ask(server(), asked, [f.fileno() for f in (nothing, *self._files)])
        self.pid = receive(self._connection)

    def poll(self):
        return self._result(0)

    def wait(self, timeout=None):
        """Its exit status, negative where a signal ended it.

        Raises:
            subprocess.TimeoutExpired: it is still running.
        """
        if self._result(timeout) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout, *self.output())
        return self.returncode

    def _result(self, timeout):
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if selector.select(timeout):
                    self.returncode = receive(self._connection)
                    self._connection.close()
        return self.returncode

    def output(self):
        """(stdout, stderr) up to now."""
        return tuple(os.pread(f.fileno(), os.fstat(f.fileno()).st_size, 0).decode() for f in self._files)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """Ends its whole process group."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


def run(module, *arguments, cwd=".", env=None, timeout=300):
    """`python -m module *arguments`, to its end.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds; its processes are killed.
    """
    command = Command(module, *arguments, cwd=cwd, env=env)
    try:
        command.wait(timeout)
    finally:
        command.kill()
    return subprocess.CompletedProcess([module, *arguments], command.returncode, *command.output())


def spawn(function, arguments=(), *, nprocs, timeout=300):
    """Calls `function(rank, *arguments)`, of a module that can be imported, in so many processes.

    Raises:
        AssertionError: one of them failed, which ends the others; it says what that one printed.
        subprocess.TimeoutExpired: one took longer than `timeout` seconds.
    """
    ranks = [Command.calling(function, rank, *arguments) for rank in range(nprocs)]
    deadline = time.monotonic() + timeout
    try:
        while any(rank.returncode is None for rank in ranks):
            failed = [rank for rank in ranks if rank.poll()]
            assert not failed, "".join(failed[0].output())
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(function.__name__, timeout, output=[r.output() for r in ranks])
            time.sleep(0.01)
    finally:
        for rank in ranks:
            rank.kill()


# The two ends of the server's socket.


def server():
    """The folder of this test run's server, which whoever comes first starts."""
    from filelock import FileLock

    folder = Path(os.environ[FOLDER])
    with FileLock(folder / "lock"):
        if not (folder / "socket").exists():
            with open(folder / "log", "w") as log:
                process = subprocess.Popen(
                    [sys.executable, __file__, folder],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                )
            (folder / "pid").write_text(str(process.pid))
            while not (folder / "socket").exists():
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.02)
    return folder


def stop(folder):
    """Ends a server, where one was started, and whatever it still runs."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((Path(folder) / "pid").read_text()), signal.SIGTERM)


def ask(folder, asked, files):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(Path(folder) / "socket"))
    message = pickle.dumps(asked)
    socket.send_fds(connection, [struct.pack("<Q", len(message))], files)
    connection.sendall(message)
    return connection


def receive(connection):
    """A number that the server says: a process's id, later its exit status."""
    said = connection.recv(8, socket.MSG_WAITALL)
    assert len(said) == 8, "the server of forked commands is gone"
    return struct.unpack("<q", said)[0]


# What is `sys.executable` to forked processes.


def shim(python, folder):
    """A process that stands for a forked one: the same arguments, files and exit status; signals go on to it."""
    arguments = sys.argv[1:]
    given = arguments[1:] if arguments[:1] == ["-u"] else arguments
    if given[:1] != ["-m"] or not is_forked(given[1]):
        os.execv(python, [python, *arguments])
    asked = {"module": given[1], "argv": given[2:], "cwd": os.getcwd(), "env": dict(os.environ)}
    connection = ask(folder, asked, [0, 1, 2])
    pid = receive(connection)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: os.killpg(pid, number))
    status = receive(connection)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def is_forked(module):
    return any(module == name or module.startswith(f"{name}.") for name in FORKED)


# The server.

# What the package and its libraries import when they first need it.
PRELOADED = ("PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "einops._torch_specific")
PRELOADED += ("hydra._internal.hydra", "hydra.core.plugins", "torch.distributed.run", "torch.distributed.fsdp")
PRELOADED += ("transformers.models.byt5.tokenization_byt5", "transformers.models.t5.modeling_t5", "wandb.wandb_run")
PRELOADED += ("antlr4.LL1Analyzer", "hydra._internal.core_plugins", "omegaconf._impl", "rich._emoji_codes")
PRELOADED += ("torch.utils.serialization.config", "wandb.sdk.launch")
PLUGINS = "hydra_plugins"


def preload():
    import grn

    for module in pkgutil.walk_packages(grn.__path__, "grn."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    plugins = pkgutil.walk_packages(importlib.import_module(PLUGINS).__path__, f"{PLUGINS}.")
    for name in (*PRELOADED, *(plugin.name for plugin in plugins)):
        importlib.import_module(name)


def serve(folder):
    """Forks a process for each that is asked for, until whoever runs the tests is gone; returns in these processes.

    Returns:
        (what was asked for; its stdin, stdout and stderr).
    """
    tester = int(os.environ[TESTER])
    preload()
    assert len(os.listdir("/proc/self/task")) == 1, "a forked process would wait for threads that it does not have"
    (folder / "python").write_text(SHIM.format(python=sys.executable, tests=str(TESTS), folder=str(folder)))
    (folder / "python").chmod(0o755)
    gc.collect()
    gc.freeze()  # else the first collection of every process copies all that was imported
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(folder / "starting"))
    listener.listen(64)
    os.rename(folder / "starting", folder / "socket")
    woken, waker = os.pipe()
    for end in (woken, waker):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)

    clients = {}  # process id -> connection
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    stopped = []
    while is_alive(tester) and not stopped:
        for key, _ in selector.select(timeout=5):
            if key.fileobj is listener:
                connection, _ = listener.accept()
                asked, files = receive_request(connection)
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    for number in (signal.SIGCHLD, signal.SIGTERM):
                        signal.signal(number, signal.SIG_DFL)
                    os.setsid()
                    tell(connection, os.getpid())
                    selector.close()
                    for inherited in (listener, connection, *clients.values()):
                        inherited.close()
                    os.close(woken)
                    os.close(waker)
                    return asked, files
                for file in files:
                    os.close(file)
                clients[pid] = connection
                selector.register(connection, selectors.EVENT_READ, pid)
            elif key.fileobj == woken:
                os.read(woken, 4096)
                for pid, status in ended():
                    connection = clients.pop(pid)
                    with contextlib.suppress(KeyError):  # its client is gone
                        selector.unregister(connection)
                    tell(connection, os.waitstatus_to_exitcode(status))
                    connection.close()
            elif key.data in clients and not key.fileobj.recv(1):  # this client is gone
                kill(key.data)
                selector.unregister(key.fileobj)
    for pid in clients:
        kill(pid)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def kill(pid):
    """With its process group, which it may not lead yet."""
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def ended():
    """(Process id, status) of the children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found


def receive_request(connection):
    length, files, *_ = socket.recv_fds(connection, 8, 3)
    return pickle.loads(connection.recv(*struct.unpack("<Q", length), socket.MSG_WAITALL)), files


def tell(connection, number):
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(struct.pack("<q", number))


def become(asked, files, shim):
    """Does in this forked process what was asked for, as a new interpreter would have it."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.executable = shim
    refresh()
    if "call" in asked:
        sys.path[:] = asked["path"]
        function, arguments = pickle.loads(asked["call"])
        function(*arguments)
        return
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    ours = (str(TESTS), str(TESTS.parent))  # this checkout comes before one that may be installed
    sys.path[:] = [asked["cwd"], *given, ours[1], *(path for path in sys.path if path not in ours)]
    sys.argv[1:] = asked["argv"]
    module = asked["module"]
    if not hasattr(sys.modules.get(module), "__path__"):
        sys.modules.pop(module, None)  # a new interpreter has it as __main__ alone
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def refresh():
    """What these packages make of the environment when they are imported."""
    from lightning.fabric.utilities import rank_zero
    from torchmetrics.utilities import prints
    from wandb import Artifact
    from wandb.sdk.data_types._private import MEDIA_TMP

    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0
    prints.rank_zero_only.rank = int(os.environ.get("LOCAL_RANK", 0))
    for folder in (MEDIA_TMP, Artifact._TMP_DIR):
        folder._finalizer.detach()  # the first process to end would delete everybody's
        folder.__init__("wandb")


if __name__ == "__main__":
    become(*serve(Path(sys.argv[1])), shim=str(Path(sys.argv[1]) / "python"))
