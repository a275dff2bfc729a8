"""The strategy of cluster=fsdp in ranks that a test has started."""

import os

import lightning
import torch.distributed as dist

from grn.training.fsdp import FSDP


def meet(rank, folder, *, ranks=2):
    """Has the ranks meet, as torchrun would have started them."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests"}
    os.environ |= {"WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)


class Sharding(lightning.LightningModule):
    def configure_model(self):
        """Lightning wants its networks to be sharded here; tests shard them themselves."""


def strategy(*, shard_size=None, precision="32-true"):
    trainer = lightning.Trainer(
        accelerator="cpu", devices=dist.get_world_size(), strategy=FSDP(shard_size), precision=precision, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.strategy.connect(Sharding())
    trainer.strategy.setup_environment()
    return trainer.strategy
