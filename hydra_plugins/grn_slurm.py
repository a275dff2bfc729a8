"""Runs and sweeps as SLURM jobs: `cluster=slurm_1x8` (conf/cluster/slurm.yaml, conf/hydra/launcher/slurm.yaml).

Here, and no part of `grn`, since Hydra takes launchers from the package `hydra_plugins` alone.
"""

import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, open_dict

from grn.runtime.errors import UserError

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as SubmititLauncher
except ImportError:

    class SubmititLauncher(Launcher):
        """Tells whoever wants it that the extra is not installed."""

        def __init__(self, **_: Any):
            raise UserError("cluster=slurm... submits by hydra-submitit-launcher: pip install 'grn[cluster]'")

        def setup(self, **_: Any) -> None: ...


log = logging.getLogger(__name__)

RULE = "-" * 22  # around a traceback that submitit tells


class SlurmLauncher(SubmititLauncher):
    """hydra-submitit-launcher with each point's job, and its logs, in the point's own run folder.

    Args:
        wait: for the jobs to end, and raise what failed in them.
        dry_run: print the batch scripts instead, also where there is no SLURM.
        params: of hydra-submitit-launcher's `submitit_slurm`.
    """

    def __init__(self, *, wait: bool, dry_run: bool, **params: Any):
        super().__init__(**params)
        self.wait, self.dry_run = wait, dry_run

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submits a job for each point.

        Raises:
            UserError: sbatch refuses one, or, with `wait`, one failed.
        """
        single = () if self._is_sweep() else ("hydra.sweep.dir=${paths.run}", "hydra.sweep.subdir=.")
        jobs = {}
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            overrides = [*overrides, *single]
            folder = self._folder(overrides, number)
            executor = self._executor(folder / "slurm")
            if self.dry_run:
                print(f"# {folder}: {' '.join(filter_overrides(overrides))}")
                print(executor._make_submission_file_text(executor._submitit_command_str, ""))
            else:
                jobs[folder] = self._submit(executor, overrides, number)
                log.info("job %s: %s", jobs[folder].job_id, folder)
        if self.wait:
            return self._results(jobs)
        return [JobReturn(overrides=overrides, status=JobStatus.COMPLETED) for overrides in job_overrides]

    def __call__(self, sweep_overrides: list[str], *arguments: Any) -> JobReturn:
        """In the job: runs the point, from where it was if the job was queued again."""
        if int(os.environ.get("SLURM_RESTART_COUNT") or 0):
            sweep_overrides = [*sweep_overrides, "ckpt_path=auto"]
        try:
            return super().__call__(sweep_overrides, *arguments)
        except SystemExit as exit:
            if not isinstance(exit.code, str):
                raise
            print(exit.code, file=sys.stderr)  # a mistake, on its one line, which who waits wants to see
            error = UserError(exit.code.removeprefix("error: "))
            return JobReturn(overrides=sweep_overrides, status=JobStatus.FAILED, _return_value=error)

    def _is_sweep(self) -> bool:
        given = OverridesParser.create().parse_overrides(list(self.config.hydra.overrides.task))
        return bool(self.config.hydra.sweeper.get("params")) or any(o.is_sweep_override() for o in given)

    def _folder(self, overrides: list[str], number: int) -> Path:
        config: DictConfig = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.num, config.hydra.job.id = number, str(number)
        return Path(config.hydra.sweep.dir, config.hydra.sweep.subdir).absolute()

    def _executor(self, folder: Path) -> Any:
        from submitit import SlurmExecutor

        class Executor(SlurmExecutor):
            @classmethod
            def affinity(cls) -> int:
                return 2  # a script is shown where there is no SLURM, too

        params = {key: value for key, value in self.params.items() if value is not None}
        executor = (Executor if self.dry_run else SlurmExecutor)(folder, max_num_timeout=params.pop("max_num_timeout"))
        executor.update_parameters(**executor._convert_parameters(params))
        return executor

    def _submit(self, executor: Any, overrides: list[str], number: int) -> Any:
        from submitit.core.utils import FailedJobError

        try:
            with redirect_stderr(StringIO()):  # sbatch's lines, of which submitit makes the error
                return executor.submit(self, overrides, "hydra.sweep.dir", number, str(number), Singleton.get_state())
        except FailedJobError as error:
            said = re.search(r"sbatch: error: (.*)", str(error))
            raise UserError(
                f"sbatch refuses the job: {said.group(1) if said else error} (what it asks for: "
                f"cluster.partition={self.params['partition']}, cluster.account, cluster.time, ...)"
            ) from error

    def _results(self, jobs: dict[Path, Any]) -> list[JobReturn]:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        logging.getLogger("submitit").setLevel(
            logging.ERROR
        )  # where there is no accounting, it says so again and again
        results, failures = [], []
        for folder, job in jobs.items():
            try:
                results.append(job.results()[0])
            except FailedJobError as error:  # with its traceback
                failures.append(f"{folder}: {str(error).rpartition(RULE)[0].strip().splitlines()[-1]}")
            except UncompletedJobError:
                failures.append(f"{folder}: job {job.job_id} ended without a result, see {job.paths.stdout}")
            except KeyboardInterrupt:
                sys.exit("no longer waiting; the jobs go on (scancel ends one)")
            else:
                if results[-1].status == JobStatus.FAILED:
                    failures.append(f"{folder}: {results[-1]._return_value}")
        if failures:
            raise UserError(f"{len(failures)} of {len(jobs)} jobs failed; {'; '.join(failures)}")
        return results
