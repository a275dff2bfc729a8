"""Shared by all tests: golden tensors, and a machine that never calls out."""

import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
from safetensors.torch import load_file
from sklearn.datasets import load_digits

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GOLDEN = Path(__file__).parent / "golden"


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
