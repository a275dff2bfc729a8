"""Shared by all tests: golden tensors, and a machine that never calls out."""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import av
import commands
import numpy as np
import pytest
import torch
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from safetensors.torch import load_file
from sklearn.datasets import load_digits

import grn.cli.entry  # noqa: F401 - the resolvers of configs, for tests that compose some by themselves

# What runs the tests in the background, as nohup and some CI do, has them ignored, here and in what is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytest_plugins = ("digit_splits",)

GOLDEN = Path(__file__).parent / "golden"


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # else xdist's workers have them from whoever started them
        os.environ[commands.FOLDER] = tempfile.mkdtemp(prefix="grn-tests-")  # short: it holds a socket
        os.environ[commands.TESTER] = str(os.getpid())


def pytest_xdist_auto_num_workers():
    """One more than there are cores, as tests wait for the commands they start; with memory in mind, five at most."""
    return min(len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else os.cpu_count() + 1, 5)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        commands.stop(os.environ[commands.FOLDER])
        shutil.rmtree(os.environ[commands.FOLDER], ignore_errors=True)  # as the server does


def pytest_collection_modifyitems(items):
    """What takes longest comes first: one of xdist's workers has all of it, and the other takes over at its end."""
    items.sort(key=lambda item: not item.path.name.startswith("test_end_to_end"))


@pytest.fixture(autouse=True)
def _process_as_found():
    """What a command that runs in this process leaves set in it, and the next test would meet."""
    yield
    HydraConfig.instance().cfg = None
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def built_once(tmp_path_factory, worker_id):
    """built_once(name, build): what build(folder) leaves there; one of pytest's workers builds, each has a copy.

    Several runs of pytest on the same tree share what is in the folder GRN_TESTS_BUILT.
    """
    shared = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        shared = shared.parent
    shared = Path(os.environ.get("GRN_TESTS_BUILT", shared))

    def built(name, build):
        template, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                template.mkdir()  # fails in the second worker where building did in the first one
                build(template)
                done.touch()
        return shutil.copytree(template, tmp_path_factory.mktemp(name), dirs_exist_ok=True)

    return built


@pytest.fixture(scope="session")
def golden():
    """golden("hbq") -> dict of tensors of tests/golden/hbq.safetensors."""
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session")
def golden_meta():
    return json.loads((GOLDEN / "meta.json").read_text())


@pytest.fixture(scope="session")
def moving_digits():
    """moving_digits(folder, count): writes mp4 files of digits that move to the right, with captions; 24 fps, 2 s."""

    def write(folder, count):
        folder.mkdir(parents=True, exist_ok=True)
        digits = load_digits().images[:count]
        for number, digit in enumerate(digits):
            tile = np.kron(digit * 255 / 16, np.ones((2, 2))).astype(np.uint8)
            with av.open(str(folder / f"{number:03d}.mp4"), "w") as container:
                stream = container.add_stream("libx264", rate=24)
                stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
                for i in range(48):
                    picture = np.zeros((32, 48, 3), dtype=np.uint8)
                    left = i * 2 // 3
                    picture[8:24, left : left + 16] = tile[..., None]
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                container.mux(stream.encode())
            (folder / f"{number:03d}.txt").write_text(f"digit {number} moving right")
        return folder

    return write
