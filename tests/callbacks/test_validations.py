"""Batches against optimiser steps: which validation is the last, what the bar shows, how often curves are logged."""

import csv
import functools
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from grn.callbacks import EvaluateSamples, Progress, RefinementFilm, SampleGrid, Throughput
from grn.callbacks.validations import is_last_validation


class Module(lightning.LightningModule):
    bundle = SimpleNamespace(num_conditions=10)

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Linear(1, 1)

    def flop_per_sample(self, batch):
        return 1

    def training_step(self, batch, batch_idx):
        return self.network(batch["x"]).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Told(lightning.Callback):
    """What is said of every validation, and what the bar shows after every batch."""

    def __init__(self):
        self.last, self.bar = [], []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.last.append((trainer.global_step, is_last_validation(trainer)))

    def on_train_batch_end(self, trainer, *_):
        if bar := trainer.progress_bar_callback:
            (task, *_) = bar.progress.tasks
            self.bar.append((task.completed, task.total))


def fit(folder=None, callbacks=(), ckpt_path=None, **arguments):
    told = Told()
    arguments = {
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "logger": False,
    } | arguments
    if Progress not in map(type, callbacks):
        arguments["enable_progress_bar"] = False
    trainer = lightning.Trainer(
        accelerator="cpu", enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[*callbacks, told], **arguments,
    )  # fmt: skip
    data = [{"x": torch.ones(1), "key": "0"}] * 1000
    loaders = [torch.utils.data.DataLoader(part, batch_size=1) for part in (data, data[:1])]
    trainer.fit(Module(), *loaders, ckpt_path=ckpt_path)
    return trainer, told


@pytest.mark.parametrize(
    ("settings", "validated"),
    [  # optimiser steps that were done when a validation began
        ({"max_steps": 20, "val_check_interval": 10, "accumulate_grad_batches": 4}, [2, 5, 7, 10, 12, 15, 17, 20]),
        ({"max_steps": 20, "val_check_interval": 10}, [10, 20]),
        ({"max_steps": 19, "val_check_interval": 10}, [10]),
        ({"max_steps": 7, "val_check_interval": 5, "accumulate_grad_batches": 3}, [1, 3, 5, 6]),
        ({"max_steps": 3, "val_check_interval": 2, "accumulate_grad_batches": 2}, [1, 2, 3]),
        ({"max_steps": 6, "val_check_interval": 4, "overfit_batches": 2}, [4]),
        ({"max_steps": 6, "val_check_interval": 1.0, "overfit_batches": 2, "check_val_every_n_epoch": 2}, [4]),
        (
            {"max_steps": 6, "val_check_interval": 1.0, "check_val_every_n_epoch": 1, "limit_train_batches": 2},
            [2, 4, 6],
        ),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 4, "val_check_interval": 4}, [4, 8]),
        (
            {"max_steps": 10, "val_check_interval": 0.5, "check_val_every_n_epoch": 1, "limit_train_batches": 8}
            | {"accumulate_grad_batches": 2},
            [2, 4, 6, 8, 10],
        ),
        (
            {"max_steps": 10, "val_check_interval": 1.0, "check_val_every_n_epoch": 2, "limit_train_batches": 3},
            [6],
        ),
        ({"max_steps": 100, "fast_dev_run": 2, "accumulate_grad_batches": 4}, [1]),
    ],
)  # fmt: skip
def test_the_last_validation_is_the_last_one_alone(settings, validated):
    _, told = fit(**settings)
    assert told.last == [(step, step == validated[-1]) for step in validated]


def test_the_bar_counts_optimiser_steps(tmp_path):
    trainer, told = fit(callbacks=[Progress()], max_steps=3, accumulate_grad_batches=2)
    assert {total for _, total in told.bar} == {3}
    assert [done for done, _ in told.bar] == [0, 1, 1, 2, 2, 3]
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    _, told = fit(callbacks=[Progress()], max_steps=5, accumulate_grad_batches=2, ckpt_path=tmp_path / "three.ckpt")
    assert {total for _, total in told.bar} == {5}
    assert [done for done, _ in told.bar] == [3, 4, 4, 5]


def test_speed_is_logged_once_a_step(tmp_path):
    logged = {"log_every_n_steps": 2, "logger": CSVLogger(tmp_path)}
    fit(tmp_path, [Throughput()], max_steps=4, accumulate_grad_batches=3, **logged)
    with open(next(tmp_path.rglob("metrics.csv"))) as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row.get("train/images_per_second")]
    assert steps == [1, 3]


def test_the_sanity_check_draws_nothing(tmp_path):
    """Its module could not."""
    drawing = [
        SampleGrid(str(tmp_path)), RefinementFilm(str(tmp_path)),
        EvaluateSamples({"none": functools.partial(dict)}, num=10, batch_size=10, cache_dir=str(tmp_path)),
    ]  # fmt: skip
    fit(tmp_path, drawing, max_steps=1, num_sanity_val_steps=1, val_check_interval=100)
    assert list(tmp_path.iterdir()) == []
