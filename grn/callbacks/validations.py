"""Numbers validations, and the step that they are logged under."""

from lightning.pytorch.trainer.states import TrainerFn

from grn.runtime.trainer import Trainer


def is_last_validation(trainer: Trainer) -> bool:
    """Whether no validation will follow before the run's last step.

    Validations are counted in batches, the run in optimizer steps of `accumulate_grad_batches` each.
    """
    if trainer.fast_dev_run or trainer.state.fn != TrainerFn.FITTING:  # the latter: by `trainer.validate`
        return True
    following, done = trainer.val_check_batch, trainer.fit_loop.batch_idx + 1  # of the epoch
    if following is None:  # by the clock, which nobody can foretell
        return trainer.global_step >= trainer.estimated_stepping_batches
    if (epochs := trainer.check_val_every_n_epoch) is not None and done + following > trainer.num_training_batches:
        following += epochs * trainer.num_training_batches - done
    pending = done % trainer.accumulate_grad_batches  # of the step that has begun
    left = (trainer.estimated_stepping_batches - trainer.global_step) * trainer.accumulate_grad_batches - pending
    return left < following


def logged_step(trainer: Trainer) -> int:
    """The step that was made last, from 0 on: that of the row in which Lightning logs a validation's metrics."""
    return max(0, trainer.global_step - 1)
