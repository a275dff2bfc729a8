"""Milestones: checkpoints that are kept, to be scored, sampled and exported later."""

from lightning.pytorch.callbacks import ModelCheckpoint

from grn.runtime.errors import UserError


class Milestones(ModelCheckpoint):
    """Keeps `step_<step>.ckpt` every so many optimizer steps.

    Args:
        dirpath: the folder.
        every_n_train_steps: 0 keeps none.
        save_weights_only: leaves optimizer state out, half of a checkpoint. What is left, averages too, can be sampled,
            scored and exported, but no run can go on from it.
    """

    def __init__(self, dirpath: str, *, every_n_train_steps: int = 0, save_weights_only: bool = False):
        if type(every_n_train_steps) is not int or every_n_train_steps < 0:
            raise UserError(
                f"callbacks.milestones.every_n_train_steps={every_n_train_steps}: a whole number of steps, 0 for none"
            )
        super().__init__(
            dirpath,
            filename="step_{step:08d}",
            auto_insert_metric_name=False,
            save_top_k=-1,
            every_n_train_steps=every_n_train_steps,
            save_weights_only=save_weights_only,
            enable_version_counter=False,
        )
