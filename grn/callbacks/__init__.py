"""Lightning callbacks: EMA, checkpoints, pictures, scores, throughput, preemption."""

from grn.callbacks.ema import EMA
from grn.callbacks.lineage import Lineage
from grn.callbacks.milestones import Milestones
from grn.callbacks.norms import LogNorms
from grn.callbacks.pictures import ReconstructionGrid, RefinementFilm, SampleGrid
from grn.callbacks.preemption import SaveLastStep, SaveOnSigterm
from grn.callbacks.progress import Progress
from grn.callbacks.pruning import Pruning
from grn.callbacks.scores import EvaluateSamples
from grn.callbacks.throughput import SkippedSamples, Throughput

__all__ = [
    "EMA",
    "EvaluateSamples",
    "Lineage",
    "LogNorms",
    "Milestones",
    "Progress",
    "Pruning",
    "ReconstructionGrid",
    "RefinementFilm",
    "SampleGrid",
    "SaveLastStep",
    "SaveOnSigterm",
    "SkippedSamples",
    "Throughput",
]
