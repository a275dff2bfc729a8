"""Lightning callbacks: what a run keeps, draws and measures on its way."""

from grn.callbacks.artifacts import CodeAndConfig
from grn.callbacks.ema import EMA
from grn.callbacks.pictures import ReconstructionGrid, RefinementFilm, SampleGrid
from grn.callbacks.preemption import SaveOnSigterm
from grn.callbacks.progress import Progress
from grn.callbacks.scores import EvaluateSamples
from grn.callbacks.throughput import SkippedSamples, Throughput

__all__ = [
    "EMA",
    "CodeAndConfig",
    "EvaluateSamples",
    "Progress",
    "ReconstructionGrid",
    "RefinementFilm",
    "SampleGrid",
    "SaveOnSigterm",
    "SkippedSamples",
    "Throughput",
]
