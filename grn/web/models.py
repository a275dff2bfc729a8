"""The checkpoints that are open, and where others are: runs under `paths.runs`."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch

from grn.checkpoints.sampler_config import read_sampler
from grn.method.sampler import Sampler
from grn.runs.listing import Run, find_runs, read_run
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.sampling.pipeline import GRNPipeline
from grn.sampling.text_bundle import TextRefinerBundle

REFINERS = ("refiner", "text refiner")
OPEN = 2  # at a time: two that are compared

EXAMPLE = CONF.parent / "experiments" / "critters" / "model"  # none beside an installed wheel


@dataclass(frozen=True)
class Model:
    """An open refiner.

    ckpt: as commands take it. file: the checkpoint that was read, of a run its newest. folder: of a run.
    """

    ckpt: str
    pipeline: GRNPipeline
    calibrated: Sampler | None

    @property
    def text(self) -> TextRefinerBundle | None:
        """The bundle of a text refiner; None of one of classes."""
        bundle = self.pipeline.bundle
        return bundle if isinstance(bundle, TextRefinerBundle) else None

    @property
    def name(self) -> str:
        return Path(self.ckpt).name or self.ckpt


class Models:
    """Opens checkpoints; the last ones stay open. Called by one thread alone."""

    def __init__(self, device: torch.device, *, ema: str | float | None = None):
        self._device, self._ema = device, ema
        self._open: OrderedDict[str, tuple[float, Model]] = OrderedDict()

    def open(self, ckpt: str) -> Model:
        """The refiner of a run folder, checkpoint file or export, read anew where a run has written since.

        Raises:
            UserError: there is none.
        """
        written = _written(ckpt)
        if ckpt in self._open and self._open[ckpt][0] == written:
            self._open.move_to_end(ckpt)
            return self._open[ckpt][1]
        self._open.pop(ckpt, None)
        pipeline = GRNPipeline.from_pretrained(ckpt, ema=self._ema).to(self._device)
        file = Path(ckpt).expanduser() / "calibration" / "sampler.yaml"
        model = Model(ckpt, pipeline, read_sampler(file) if file.is_file() else None)
        self._open[ckpt] = (written, model)
        while len(self._open) > OPEN:
            self._open.popitem(last=False)
        return model


def refiners(runs: str | Path) -> list[Run]:
    """The runs that can be opened, the newest first."""
    return [run for run in find_runs(runs) if run.kind in REFINERS and run.checkpoint is not None]


def newest(runs: str | Path) -> str:
    """The run folder of a refiner that was written last; of none, the critters that a checkout comes with.

    Raises:
        UserError: neither is there.
    """
    found = refiners(runs)
    if not found and EXAMPLE.is_dir():
        return str(EXAMPLE)
    if not found:
        raise UserError(
            f"paths.runs={runs} has no run of a refiner: train one (make demo, or +experiment=digits_c2i), or give "
            "ckpt=..."
        )
    return str(found[0].folder)


def _written(ckpt: str) -> float:
    folder = Path(ckpt).expanduser()
    checkpoint = read_run(folder).checkpoint if (folder / "checkpoints").is_dir() else folder
    try:
        return checkpoint.stat().st_mtime if checkpoint else 0.0
    except OSError:
        return 0.0
