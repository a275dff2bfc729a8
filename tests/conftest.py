"""Shared by all tests: golden tensors, and a machine that never calls out."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

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
