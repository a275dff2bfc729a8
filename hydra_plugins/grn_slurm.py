"""Runs and sweeps as SLURM jobs: `cluster=slurm_1x8` (conf/cluster/slurm.yaml, conf/hydra/launcher/slurm.yaml).

Here, and no part of `grn`, since Hydra takes launchers from the package `hydra_plugins` alone.
"""

import logging
import os
import re
import sys
import time
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

from grn.cli.checks import check_cluster
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
    """hydra-submitit-launcher with logs in the run's folder, or the sweep's; a sweep is one array.

    Args:
        wait: for the jobs to end, and raise what failed in them.
        dry_run: print the batch scripts instead, also where there is no SLURM.
        params: of hydra-submitit-launcher's `submitit_slurm`.
    """

    def __init__(self, *, wait: bool, dry_run: bool, **params: Any):
        super().__init__(**params)
        self.wait, self.dry_run = wait, dry_run

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submits a job, of several points an array.

        Raises:
            UserError: the cluster is for other commands, sbatch refuses it, or, with `wait`, one failed.
        """
        check_cluster(self.config, self.config.hydra)
        single = () if self._is_sweep() else ("hydra.sweep.dir=${hydra.run.dir}", "hydra.sweep.subdir=.")
        points = {}
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            overrides = [*overrides, *single]
            points[self._folder(overrides, number)] = number, overrides
        logs = next(iter(points)) if single else Path(self.config.hydra.sweep.dir).absolute()
        executor = self._executor(logs / "slurm")
        if self.dry_run:
            for folder, (_, overrides) in points.items():
                print(f"# {folder}: {' '.join(filter_overrides(overrides))}")
            if len(points) > 1:
                executor.parameters["map_count"] = len(points)
            print(executor._make_submission_file_text(executor._submitit_command_str, ""))
        else:
            jobs = self._submit(executor, points)
            if self.wait:
                return self._results(jobs)
        return [JobReturn(overrides=overrides, status=JobStatus.COMPLETED) for overrides in job_overrides]

    def __call__(self, sweep_overrides: list[str], *arguments: Any) -> JobReturn:
        """In the job: runs the point; training, from where it was if the job was queued again."""
        from submitit import JobEnvironment

        JobEnvironment().paths.result_pickle.unlink(missing_ok=True)  # of an earlier start
        if int(os.environ.get("SLURM_RESTART_COUNT") or 0) and "ckpt_path" in self.config:
            sweep_overrides = [*sweep_overrides, "ckpt_path=auto"]
        try:
            result = super().__call__(sweep_overrides, *arguments)
        except SystemExit as exit:
            if isinstance(exit.code, str):
                print(exit.code, file=sys.stderr)  # a mistake, on its one line, which who waits wants to see
                error = UserError(exit.code.removeprefix("error: "))
            elif exit.code == 1:  # another task tells it
                error = None
            else:
                raise
            return JobReturn(overrides=sweep_overrides, status=JobStatus.FAILED, _return_value=error)
        self._stay()
        return result

    @staticmethod
    def _stay() -> None:
        """At the end of its time, SLURM's signal has the first task queue the job again: it stays as long as others."""
        from submitit import JobEnvironment
        from submitit.core.utils import JobPaths

        running = JobEnvironment()
        for task in range(1, running.num_tasks if running.global_rank == 0 else 0):
            result = JobPaths(os.environ["SUBMITIT_FOLDER"], running.job_id, task).result_pickle
            while not result.exists():
                time.sleep(0.5)

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

    def _submit(self, executor: Any, points: dict[Path, tuple[int, list[str]]]) -> dict[Path, Any]:
        from submitit.core.utils import FailedJobError

        arguments = [
            (overrides, "hydra.sweep.dir", number, str(number), Singleton.get_state())
            for number, overrides in points.values()
        ]
        try:
            with redirect_stderr(StringIO()):  # sbatch's lines, of which submitit makes the error
                jobs = dict(zip(points, executor.map_array(self, *zip(*arguments))))
        except FailedJobError as error:
            said = re.search(r"sbatch: error: (.*)", str(error))
            raise UserError(
                f"sbatch refuses the job: {said.group(1) if said else error} (what it asks for: "
                f"cluster.partition={self.params['partition']}, cluster.account, cluster.time, ...)"
            ) from error
        for folder, job in jobs.items():
            log.info("job %s: %s", job.job_id, folder)
        return jobs

    def _results(self, jobs: dict[Path, Any]) -> list[JobReturn]:
        logging.getLogger("submitit").setLevel(
            logging.ERROR
        )  # where there is no accounting, it says so again and again
        results, failures = [], []
        for folder, job in jobs.items():
            tasks = [_outcome(job.task(number)) for number in range(job.num_tasks)]
            results.append(tasks[0])
            told = [task._return_value for task in tasks if task.status == JobStatus.FAILED]
            if told:  # the first that knows why
                failures.append(f"{folder}: {next(filter(None, told), f'job {job.job_id} failed')}")
        if failures:
            raise UserError(f"{len(failures)} of {len(jobs)} jobs failed; {'; '.join(failures)}")
        return results


def _outcome(task: Any) -> JobReturn:
    """What a task of a job returned, once it has ended; of one that failed, with the reason."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return task.result()
    except FailedJobError as error:  # with its traceback
        reason = str(error).rpartition(RULE)[0].strip().splitlines()[-1]
    except UncompletedJobError:
        reason = f"job {task.job_id} ended without a result, see {task.paths.stdout}"
    except KeyboardInterrupt:
        sys.exit("no longer waiting; the jobs go on (scancel ends one)")
    return JobReturn(status=JobStatus.FAILED, _return_value=UserError(reason))
