"""GRN: an experiment framework for Generative Refinement Networks (arXiv 2604.13030)."""

from typing import Any

from grn.runtime.openmp import bound_spinning

bound_spinning()  # here, since whoever imports torch through GRN imports this first


def __getattr__(name: str) -> Any:
    """What takes its time, only when asked for."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("grn")
        except PackageNotFoundError:  # a checkout on PYTHONPATH that was never installed
            return "0+unknown"
    if name == "GRNPipeline":
        from grn.sampling.pipeline import GRNPipeline

        return GRNPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
