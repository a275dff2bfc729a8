"""Sweeps whose points Optuna chooses: `+search=...` (conf/hydra/sweeper/search.yaml).

Here, and no part of `grn`, since Hydra takes sweepers from the package `hydra_plugins` alone. (hydra-optuna-sweeper is
for Optuna 2.)
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from grn.runs.studies import optuna_here, storage_of
from grn.runs.sweeps import Failed
from grn.runtime.errors import UserError, check_count

log = logging.getLogger(__name__)
DIRECTIONS = ("minimize", "maximize")


class OptunaSweeper(Sweeper):
    """Asks a study for points, has them run by the launcher, and tells it what they came to.

    A point is the study's trial of its number. The study is kept: the same command goes on after the trials it has, and
    asks for those again that were killed. A point that fails is told as such, and the others go on.

    Args:
        n_trials: in all.
        n_jobs: points that the launcher gets at once.
        direction: minimize or maximize; a list of these, where `monitor` is a list.
        study_name, storage: `grn.runs.studies.storage_of`.
        sampler, pruner: configs of Optuna's; None: its defaults, and no pruning.
        params: key -> sweep, in Hydra's grammar; what else is given on the command line is added.
    """

    def __init__(
        self,
        *,
        n_trials: int,
        n_jobs: int,
        direction: str | Sequence[str],
        study_name: str,
        storage: str | None,
        sampler: Mapping[str, Any] | None,
        pruner: Mapping[str, Any] | None,
        params: Mapping[str, Any],
    ):
        check_count("hydra.sweeper.n_trials", n_trials)
        check_count("hydra.sweeper.n_jobs", n_jobs)
        self.directions = list(direction) if isinstance(direction, (list, tuple, ListConfig)) else [direction]
        if not self.directions or any(one not in DIRECTIONS for one in self.directions):
            raise UserError(f"hydra.sweeper.direction={direction} must be minimize or maximize, or a list of these")
        if pruner is not None and len(self.directions) > 1:
            raise UserError("hydra.sweeper.pruner: Optuna ends no points early of several directions; give null")
        self.n_trials, self.n_jobs, self.study_name, self.storage = n_trials, n_jobs, study_name, storage
        self.sampler, self.pruner, self.params = sampler, pruner, dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Raises:
        UserError: Optuna is not there; a search space that is none, or another one than the study's.
        """
        optuna = optuna_here()
        given = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        space, fixed = search_space(parser.parse_overrides(given))
        if not space:
            raise UserError("hydra.sweeper.params: there is nothing to search; give key=interval(a,b) or choice(a,b)")
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        storage = storage_of(self.storage, folder)
        study = self._study(optuna, storage)
        done = self._go_on(optuna, study)
        if done:
            log.info("%s has %d of hydra.sweeper.n_trials=%d points", self.study_name, done, self.n_trials)
        while done < self.n_trials:
            trials = [study.ask(space) for _ in range(min(self.n_jobs, self.n_trials - done))]
            points = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in trials]
            returns = self.launcher.launch(points, initial_job_idx=trials[0].number)
            for trial, returned in zip(trials, returns, strict=True):
                self._tell(optuna, study, trial, returned)
            done += len(trials)
        self._report(optuna, study)

    def _study(self, optuna: Any, storage: Any) -> Any:
        if self.config.get("overwrite") and self.study_name in optuna.study.get_all_study_names(storage):
            optuna.delete_study(study_name=self.study_name, storage=storage)
        # As it looks at all earlier points, the seed of a study that goes on must not draw the same ones again.
        pruner = optuna.pruners.NopPruner() if self.pruner is None else instantiate(self.pruner)
        study = optuna.create_study(
            study_name=self.study_name, storage=storage, directions=self.directions, load_if_exists=True, pruner=pruner
        )
        if self.sampler is not None:
            sampler = dict(self.sampler)
            if isinstance(sampler.get("seed"), int):
                sampler["seed"] += len(study.trials)
            study.sampler = instantiate(sampler)
        if [direction.name.lower() for direction in study.directions] != self.directions:
            raise UserError(
                f"hydra.sweeper.direction={self.directions}: the study {self.study_name} has others: give "
                "overwrite=true or another hydra.sweeper.study_name"
            )
        return study

    def _go_on(self, optuna: Any, study: Any) -> int:
        """How many points are done; those that were killed while they ran come again."""
        done, states = 0, optuna.trial.TrialState
        for trial in study.get_trials(deepcopy=False):
            if trial.state == states.RUNNING:
                study.tell(trial.number, state=states.FAIL)
                study.enqueue_trial(trial.params)
            elif trial.state in (states.COMPLETE, states.PRUNED) or "failed" in trial.user_attrs:
                done += 1
        return done

    def _tell(self, optuna: Any, study: Any, trial: Any, returned: JobReturn) -> None:
        value, states = returned._return_value, optuna.trial.TrialState
        if returned.status == JobStatus.FAILED and not isinstance(value, Failed):
            value = Failed(str(value))
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if not isinstance(value, Failed):
            if not all(isinstance(one, (int, float)) and math.isfinite(one) for one in values):
                value = Failed(f"{self.config.get('monitor') or 'what was measured'} is {value}, no finite number")
            elif len(values) != len(self.directions):
                raise UserError(
                    f"hydra.sweeper.direction={self.directions}: monitor={self.config.get('monitor')} gives "
                    f"{len(values)} numbers; give as many directions"
                )
        if isinstance(value, Failed):
            log.warning("point %d failed: %s", trial.number, value.reason)
            trial.set_user_attr("failed", value.reason[:1000])
            study.tell(trial, state=states.FAIL)
        elif "pruned" in study.get_trials(deepcopy=False)[trial.number].user_attrs:
            study.tell(trial, state=states.PRUNED)
        else:
            study.tell(trial, values)

    def _report(self, optuna: Any, study: Any) -> None:
        states = optuna.trial.TrialState
        counts = {state.name.lower(): len(study.get_trials(states=[state], deepcopy=False)) for state in states}
        log.info("%s: %s", self.study_name, ", ".join(f"{count} {name}" for name, count in counts.items() if count))
        for trial in study.best_trials if counts["complete"] else ():
            found = " ".join(f"{key}={value}" for key, value in trial.params.items())
            log.info("best: point %d, %s with %s", trial.number, ", ".join(f"{it:.6g}" for it in trial.values), found)


def search_space(overrides: Sequence[Override]) -> tuple[dict[str, Any], list[str]]:
    """(key -> distribution of what is swept, what stays as it is); of a key that is given twice, the last.

    Choices are texts, as they stand on the command line: lists are choices like others.
    """
    space: dict[str, Any] = {}
    fixed: dict[str, str] = {}
    for override in overrides:
        key = override.get_key_element()
        space.pop(key, None)
        fixed.pop(key, None)
        if override.is_sweep_override():
            space[key] = _distribution(override)
        else:
            fixed[key] = override.input_line or f"{key}={override.get_value_element_as_str()}"
    return space, list(fixed.values())


def _distribution(override: Override) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep, key = override.value(), override.get_key_element()
    if override.is_interval_sweep():
        kind = IntDistribution if type(sweep.start) is int and type(sweep.end) is int else FloatDistribution
        try:
            return kind(sweep.start, sweep.end, log="log" in sweep.tags)
        except ValueError as error:
            raise UserError(f"hydra.sweeper.params.{key}: {' '.join(str(error).split())}") from None
    if override.is_range_sweep() and not sweep.shuffle:
        values = sorted(sweep.range())
        if values and all(type(value) is int for value in values):
            return IntDistribution(values[0], values[-1], step=abs(int(sweep.step)))
    return CategoricalDistribution([*override.sweep_string_iterator()])
