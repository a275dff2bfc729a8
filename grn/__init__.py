"""GRN: an experiment framework for Generative Refinement Networks (arXiv 2604.13030)."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("grn")
except PackageNotFoundError:  # a checkout on PYTHONPATH that was never installed
    __version__ = "0+unknown"
