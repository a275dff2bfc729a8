"""Which validation of a run this is."""

from lightning import Trainer


def is_last_validation(trainer: Trainer) -> bool:
    """Whether no validation will follow before the run's last step."""
    return trainer.global_step + trainer.val_check_interval > trainer.max_steps
