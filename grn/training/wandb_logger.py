"""Lightning's W&B logger for run folders; what else is done with their W&B runs is in `grn.runs.wandb_runs`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from grn.runs.wandb_runs import RECORD, STEP, open_run, read_record
from grn.runtime.files import write_json


class RunLogger(WandbLogger):
    """Lightning's W&B logger for a run folder: a run that goes on has the W&B run that it had, under rising steps.

    A row of W&B's history is an optimizer step, counted from 0 as Lightning does. Where a step is trained again that an
    earlier start has logged, its rows come after that one's.

    Args:
        save_dir: the run folder.
        resumed: what training goes on from, and with it the folder's W&B run; None: a new one.
        offline: writes to `<save_dir>/wandb` for `wandb sync`; so it does, with a warning, where W&B cannot be reached.
        arguments: as `WandbLogger` has them.

    Raises:
        UserError: W&B refuses the key or a setting; when the first thing is logged.
    """

    def __init__(self, *, save_dir: str, resumed: str | None, offline: bool, **arguments: Any):
        if log_model := arguments.pop("log_model", False):
            log_model = not offline and log_model  # nothing is uploaded from here
        super().__init__(save_dir=save_dir, offline=offline, log_model=log_model, **arguments)
        self.folder, self.resumed = Path(save_dir), resumed
        self._row = -1
        self._shift: int | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run."""
        if self._experiment is None:
            arguments = {name: value for name, value in self._wandb_init.items() if name not in ("dir", "anonymous")}
            earlier = read_record(self.folder) if self.resumed is not None else None
            if earlier and arguments["id"] in (None, earlier["id"]):
                arguments["id"], self._row = earlier["id"], earlier["step"]
            self._experiment = open_run(self.folder, offline=self._offline, **arguments)
            if self._experiment.settings.mode != "online":
                self._log_model = False
            self._row = max(self._row, self._experiment.step - 1)
            self._experiment.define_metric(STEP)
            self._experiment.define_metric("*", step_metric=STEP, step_sync=True)
            self._write_record()
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        run = self.experiment
        counted = max(0, self._row) if step is None else step
        shift = self._shift = max(0, self._row + 1 - counted) if self._shift is None else self._shift
        row = max(self._row, counted + shift)
        run.log({**metrics, STEP: counted}, step=row)
        if row > self._row:
            self._row = row
            self._write_record()

    def _write_record(self) -> None:
        run = self._experiment
        about = {"id": run.id, "project": run.project, "entity": run.entity or None, "step": self._row}
        write_json(self.folder / RECORD, about)
