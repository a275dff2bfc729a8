"""The launcher of a run's processes: srun, torchrun or Lightning."""

import os

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from grn.runtime.errors import UserError
from grn.runtime.ranks import place

NODE = ("NODE_RANK", "GROUP_RANK")  # who starts a node's process by hand says so in one of them


def cluster_environment(devices: int | str, num_nodes: int) -> list[ClusterEnvironment]:
    """The plugin for a trainer; [] leaves it to Lightning.

    Lightning takes any process that sees SLURM's variables for one that srun started: also one in a batch script that
    starts its own processes, or started by hand in somebody's allocation.

    Raises:
        UserError: srun started processes in a way that Lightning does not take, or several nodes need one that did.
    """
    if TorchElasticEnvironment.detect() or not any(name.startswith("SLURM_") for name in os.environ):
        return []
    if place()[2] > 1:
        try:
            return [SLURMEnvironment(auto_requeue=False)]  # Lightning's way would save within the signal's handler
        except (RuntimeError, ValueError) as error:
            raise UserError(f"SLURM: {' '.join(str(error).split())}") from None
    if num_nodes > 1 and not any(name in os.environ for name in NODE):
        raise UserError(
            f"cluster.num_nodes={num_nodes}, but srun did not start this process: start it by "
            f"`srun --nodes={num_nodes} --ntasks-per-node={devices}`, let cluster=slurm_... submit it, or use torchrun"
        )
    return [LightningEnvironment()]


def check_started(num_devices: int, num_nodes: int) -> None:
    """Raises:
    UserError: torchrun or srun started another number of processes than the trainer has devices.
    """
    started = place()[2]
    if started > 1 and started != num_devices * num_nodes:
        raise UserError(
            f"{started} processes were started, but cluster.devices={num_devices} times cluster.num_nodes={num_nodes} "
            f"are {num_devices * num_nodes}: start as many (srun --nodes={num_nodes} --ntasks-per-node={num_devices}), "
            "or give other numbers"
        )
