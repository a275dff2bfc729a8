"""Which of several processes this is, as torchrun or srun started them."""

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment


def place() -> tuple[int, int, int]:
    """(rank, rank on this machine, ranks); (0, 0, 1) where nobody started several."""
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            environment = kind()
            return environment.global_rank(), environment.local_rank(), environment.world_size()
    return 0, 0, 1
