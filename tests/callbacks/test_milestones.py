"""Checkpoints that stay, with or without optimiser state; and which one of a run folder is meant."""

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from grn.callbacks import EMA, Milestones
from grn.runtime.errors import UserError


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.network, self.checkpoint_extras = nn.Linear(3, 1), {}

    def training_step(self, batch, batch_idx):
        return self.network(batch).sum()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.network.parameters())

    def on_save_checkpoint(self, checkpoint):
        checkpoint.update(self.checkpoint_extras)


def fit(folder, *, accumulate=1, steps=7, **options):
    ema = EMA([0.5], use=0.5)
    last = ModelCheckpoint(folder, filename="last", every_n_train_steps=3, enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[ema, last, Milestones(str(folder), **options)],
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.rand(8, 3)))
    found = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.ckpt")}
    return found, ema


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("light", [False, True])
def test_one_stays_every_so_many_steps(tmp_path, accumulate, light):
    """Also where `last` is saved as often, which Lightning would take for the same callback."""
    found, ema = fit(tmp_path, accumulate=accumulate, steps=6, every_n_train_steps=3, save_weights_only=light)
    assert set(found) == {"last.ckpt", "step_00000003.ckpt", "step_00000006.ckpt"}
    for name, contents in found.items():
        assert ("optimizer_states" in contents) == (name == "last.ckpt" or not light)
        assert contents["ema_use"] == "0.5"
    assert [found[f"step_0000000{step}.ckpt"]["global_step"] for step in (3, 6)] == [3, 6]
    averages = [found[name]["ema"]["0.5"]["weight"] for name in ("step_00000003.ckpt", "step_00000006.ckpt")]
    assert torch.equal(averages[1], ema.averages["0.5"]["weight"])
    assert not torch.equal(*averages)


def test_none_stays_unless_asked_for(tmp_path):
    assert set(fit(tmp_path)[0]) == {"last.ckpt"}
    for wrong in (-1, 2.5, None):
        with pytest.raises(UserError, match=r"^callbacks\.milestones\.every_n_train_steps=.* a whole number of steps"):
            Milestones(str(tmp_path), every_n_train_steps=wrong)
