"""Which of several processes this is, as torchrun or srun started them."""

import os

# torchrun's variables; and srun's, of which the last is not there in a batch script that srun did not start.
LAUNCHERS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
)


def place() -> tuple[int, int, int]:
    """(rank, rank on this machine, ranks); (0, 0, 1) where nobody started several."""
    for names in LAUNCHERS:
        if all(name in os.environ for name in names):
            rank, local_rank, world_size = (int(os.environ[name]) for name in names)
            return rank, local_rank, world_size
    return 0, 0, 1
