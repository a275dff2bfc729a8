"""GRN: an experiment framework for Generative Refinement Networks (arXiv 2604.13030)."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("grn")
except PackageNotFoundError:  # a checkout on PYTHONPATH that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name != "GRNPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from grn.pipeline import GRNPipeline  # only when asked for: it takes seconds to import torch

    return GRNPipeline
