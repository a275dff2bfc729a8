"""Points of a sweep side by side on one machine: `hydra/launcher=parallel` (conf/hydra/launcher/parallel.yaml)."""

import functools
import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig

from grn.runs.sweeps import Failed
from grn.runtime.errors import UserError

try:
    from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
except ImportError:

    class JoblibLauncher(Launcher):
        """Tells whoever wants it that the extra is not installed."""

        def __init__(self, **_: Any):
            raise UserError("hydra/launcher=parallel needs hydra-joblib-launcher: pip install 'grn[joblib]'")

        def setup(self, **_: Any) -> None: ...


class ParallelLauncher(JoblibLauncher):
    """hydra-joblib-launcher whose points may have loaders' workers, and go on where one fails.

    Args:
        n_jobs: points at once; -1: one for each CPU. Others are joblib.Parallel's.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: Callable[..., Any], config: DictConfig) -> None:
        self.failed: list[str] = task_function.failed  # in this process, which ends with status 1
        function = functools.partial(_point, task_function)
        super().setup(hydra_context=hydra_context, task_function=function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the points; what fails is a `Failed`."""
        points = super().launch(job_overrides, initial_job_idx)
        returned = [(str(number), point._return_value) for number, point in enumerate(points, initial_job_idx)]
        self.failed += [number for number, value in returned if isinstance(value, Failed)]
        return points


def _point(task: Callable[[DictConfig], object], config: DictConfig) -> object:
    multiprocessing.set_start_method(None, force=True)  # joblib's own, by which loaders start no workers
    return task(config)
