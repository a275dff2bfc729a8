"""A real SLURM of one node on this machine (Debian: slurm-wlm, munge; as root): jobs of `cluster=slurm`."""

import csv
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from grn.weights.kinds import is_checkpoint

pytestmark = pytest.mark.slurm

TOKENIZER = "+experiment=digits_tokenizer model.dim=8 model.decoder_dim=8 trainer.max_steps=4 training.warmup_steps=2"
TOKENIZER += " data.batch_size=20"
REFINER = "+experiment=digits_c2i model.depth=2 model.width=32 model.heads=2 model.bottleneck=16 model.context_start=1"
REFINER += " trainer.max_steps=100 trainer.val_check_interval=100 training.warmup_steps=2 data.batch_size=20"
REFINER += " callbacks.last.every_n_train_steps=5 callbacks.grid.num=10 scores=none logger=csv"
SLURM = " cluster=slurm cluster.accelerator=cpu cluster.precision=32-true cluster.gpus_per_node=null"
SLURM += " cluster.cpus_per_task=1"
TASKS = " cluster=slurm_cpu cluster.devices=2 cluster.cpus_per_task=1"

CONF = """
ClusterName=grn
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=5
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


@contextmanager
def process(command, log, **keywords):
    with open(log, "w") as out:
        running = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **keywords)
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(timeout=20)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def missing():
    """What keeps these tests from running here, or None."""
    lacking = [name for name in ("munged", "slurmctld", "slurmd", "srun", "sbatch") if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed: apt-get install slurm-wlm munge"
    if os.getuid() != 0:
        return "only root starts slurmd"
    if find_spec("submitit") is None:
        return "submitit is not installed: pip install 'grn[cluster]'"
    return None


@pytest.fixture(scope="module")
def slurm():
    """The environment in which SLURM's commands find the one that was started."""
    if reason := missing():
        (pytest.fail if os.environ.get("GRN_SLURM") == "required" else pytest.skip)(reason)
    folder = Path(tempfile.mkdtemp(prefix="grn-slurm-"))  # pytest's is closed to the user munge
    folder.chmod(0o755)
    munge, user = folder / "munge", pwd.getpwnam("munge")
    for path in (munge, folder / "state", folder / "spool"):
        path.mkdir()
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o400)
    for path in (munge, munge / "key"):
        os.chown(path, user.pw_uid, user.pw_gid)
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        ports = a.getsockname()[1], b.getsockname()[1]
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname().partition(".")[0], ports=ports, folder=folder))
    environment = os.environ | {"SLURM_CONF": str(conf)}
    places = [f"--{what}-file={munge / what}" for what in ("key", "pid", "log", "seed")]
    munged = ["munged", "--foreground", f"--socket={munge / 'socket'}", *places]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        stack.enter_context(
            process(munged, folder / "munged.log", user=user.pw_uid, group=user.pw_gid, extra_groups=[])
        )
        wait_for(lambda: (munge / "socket").exists(), "munged")
        stack.enter_context(process(["slurmctld", "-D"], folder / "slurmctld.log", env=environment))
        stack.enter_context(process(["slurmd", "-D"], folder / "slurmd.log", env=environment))
        wait_for(lambda: "idle" in said(environment, "sinfo", "-h", "-o", "%T"), "an idle node")
        yield environment
        said(environment, "scancel", "--user=root")
        wait_for(lambda: not said(environment, "squeue", "-h", "-t", "R,CG"), "the jobs to end")


@pytest.fixture(scope="module")
def workspace(slurm, tmp_path_factory):
    """(folder with prepared digits and a tokenizer, environment of commands in it)"""
    folder = tmp_path_factory.mktemp("slurm")
    environment = slurm | {
        "GRN_DATA": str(folder / "data"),
        "GRN_RUNS": str(folder / "runs"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    for arguments in ("prepare data=digits", "train logger=csv " + TOKENIZER, "train name=whole " + REFINER):
        done = start(folder, environment, arguments)
        assert done.wait(timeout=600) == 0, done.stderr.read()
    return folder, environment


def start(folder, environment, arguments):
    verb, *rest = arguments.split()
    command = [sys.executable, "-m", f"grn.{verb}", *rest]
    return subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(environment, *command):
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout.strip()


def wait_for(condition, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def job_of(folder):
    """Of an array, that of its first point."""
    return min((folder / "slurm").glob("*_submitted.pkl")).name.removesuffix("_submitted.pkl")


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_same_bits(whole, resumed):
    a, b = weights(whole), weights(resumed)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_sweep_finishes_and_its_stopped_point_resumes_by_itself(workspace):
    folder, environment = workspace
    sweep = start(folder, environment, f"train -m {REFINER}{SLURM} seed=0,1")
    points = [folder / "runs" / "sweeps" / "digits_c2i" / number for number in "01"]
    wait_for(lambda: is_checkpoint(points[0] / "checkpoints" / "last.ckpt"), "the first checkpoint")
    said(environment, "scancel", "--signal=USR2", job_of(points[0].parent))  # what SLURM sends before the time is up
    printed, errors = sweep.communicate(timeout=240)
    assert sweep.returncode == 0, errors
    for point, starts in zip(points, (2, 1)):
        assert json.loads((point / "metrics.json").read_text())["step"] == 100
        assert len((point / "command.txt").read_text().splitlines()) == starts
    logs = {path.name.partition("_")[2] for path in (points[0].parent / "slurm").glob("*_log.out")}
    assert logs == {"0_0_log.out", "1_0_log.out"}  # of one array
    log = (points[0] / "train.log").read_text()
    assert "stopped by SIGUSR2 after step" in log
    assert "seed=0 ckpt_path=auto" in (points[0] / "command.txt").read_text().splitlines()[1]
    assert_same_bits(folder / "runs" / "whole", points[0])
    with open(points[0].parent / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["seed"] for row in rows} == {"0", "1"}
    losses = [float(row["val/loss"]) for row in rows]
    assert losses == sorted(losses)
    assert "table.csv" in printed


def test_a_preempted_job_resumes_by_itself(workspace):
    """SLURM sends SIGTERM, and kills after GraceTime; a job that ends meanwhile would not be queued again."""
    folder, environment = workspace
    run = folder / "runs" / "digits_c2i"
    training = start(folder, environment, f"train {REFINER}{SLURM}")
    wait_for(lambda: is_checkpoint(run / "checkpoints" / "last.ckpt"), "the first checkpoint")
    said(environment, "sbatch", "--partition=urgent", "--cpus-per-task=2", "--output=/dev/null", "--wrap=sleep 1")
    _, errors = training.communicate(timeout=240)
    assert training.returncode == 0, errors
    assert "stopped by SIGTERM after step" in (run / "train.log").read_text()
    assert len((run / "command.txt").read_text().splitlines()) == 2
    assert_same_bits(folder / "runs" / "whole", run)


def test_shards_are_dealt_to_tasks_that_go_on(workspace):
    folder, environment = workspace
    encode = "encode ckpt=runs/digits_tokenizer data=digits batch_size=1"
    alone = start(folder, environment, f"{encode} out=alone")
    assert alone.wait(timeout=240) == 0, alone.stderr.read()
    encoding = start(folder, environment, f"{encode} out=tokens{TASKS}")
    partial = folder / ".tokens.partial"
    wait_for(lambda: all((partial / f"train-00000{n}.json").exists() for n in range(2)), "a shard of each task")
    kept = {path.stem: path.stat().st_mtime_ns for path in partial.glob("train-*.json")}
    said(environment, "scancel", "--signal=USR2", job_of(folder / "runs" / "encode"))
    _, errors = encoding.communicate(timeout=240)
    assert encoding.returncode == 0, errors
    shards = {path.name: path.read_bytes() for path in (folder / "tokens").glob("*.tar")}
    assert shards == {path.name: path.read_bytes() for path in (folder / "alone").glob("*.tar")}
    assert 2 <= len(kept) < len(shards)
    written = {name: (folder / "tokens" / f"{name}.tar").stat().st_mtime_ns for name in kept}
    assert all(written[name] <= kept[name] for name in kept)  # and not again
    logs = [path.read_text() for path in sorted((folder / "runs" / "encode" / "slurm").glob("*_log.out"))]
    assert len(logs) == 2
    assert "Requeued job" in logs[0]
    assert all(log.count("Starting with JobEnvironment") == 2 for log in logs)


def test_samples_are_dealt_to_tasks(workspace):
    folder, environment = workspace
    evaluate = "evaluate ckpt=runs/whole num=20 scores=none sampler=linear sampler.schedule.steps=2 out=dealt"
    done = start(folder, environment, evaluate + TASKS)
    assert done.wait(timeout=240) == 0, done.stderr.read()
    report = json.loads((folder / "dealt" / "metrics.json").read_text())
    assert report["steps_histogram"] == {"2": 20}  # of both
    logs = sorted((folder / "dealt" / "slurm").glob("*_log.out"))
    assert [log.read_text().count("steps_mean") for log in logs] == [1, 0]  # the first one tells


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("name=nowhere cluster.partition=nowhere", "sbatch refuses the job: invalid partition specified: nowhere"),
        ("name=whole", "already holds a run"),  # found in the job
    ],
)
def test_mistakes_take_one_line(workspace, arguments, expected):
    folder, environment = workspace
    training = start(folder, environment, f"train {REFINER}{SLURM} {arguments}")
    _, errors = training.communicate(timeout=120)
    assert training.returncode == 1
    (line,) = [line for line in errors.splitlines() if "error" in line]
    assert line.startswith("error: ")
    assert expected in line
