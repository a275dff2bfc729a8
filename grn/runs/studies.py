"""Optuna's studies: where they are kept, and the trial that a point of a sweep is."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from grn.runtime.errors import UserError

JOURNAL = "optuna.journal"


def optuna_here() -> Any:
    """The package, or a UserError that says how to have it."""
    try:
        import optuna
    except ImportError:
        raise UserError("searches are by Optuna: pip install 'grn[optuna]'") from None
    if not hasattr(optuna.distributions, "FloatDistribution"):
        raise UserError(f"Optuna {optuna.__version__} is too old: pip install 'grn[optuna]'")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def storage_of(storage: str | None, folder: Path) -> Any:
    """Args:
        storage: a URL of SQLAlchemy's; None: the file `optuna.journal` in `folder`, which several processes may write.

    Raises:
        UserError: no such database.
    """
    optuna = optuna_here()
    if storage is None:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        path = str(folder / JOURNAL)
        return JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
    try:
        return optuna.storages.get_storage(storage)
    except Exception as error:  # of SQLAlchemy and its drivers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"hydra.sweeper.storage cannot be opened ({reason[:200]})") from None


def own_trial() -> Any:
    """The trial that this point of a sweep is, in whatever process; None outside of a search, and of one that ends no
    points early."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    running = HydraConfig.get()
    if not str(running.sweeper.get("_target_")).endswith(".OptunaSweeper") or running.sweeper.pruner is None:
        return None
    optuna = optuna_here()
    from hydra.utils import instantiate

    storage = storage_of(running.sweeper.storage, Path(running.sweep.dir))
    pruner = instantiate(running.sweeper.pruner)
    study = optuna.load_study(study_name=running.sweeper.study_name, storage=storage, pruner=pruner)
    return optuna.trial.Trial(study, study.get_trials(deepcopy=False)[running.job.num]._trial_id)
