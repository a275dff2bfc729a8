import csv

import pytest
import torch
import wandb
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from test_generation import GUIDED, tiny_module

from grn.callbacks import EvaluateSamples
from grn.evaluation import score_samples, steps_by_class


class Brightness:
    def reset(self):
        self.seen = []

    def update(self, images, labels, ids):
        self.seen += ids.tolist()

    def compute(self):
        assert sorted(self.seen) == list(range(20))
        return {"seen": float(len(self.seen))}


def test_steps_are_counted_by_class():
    module, taken = tiny_module(GUIDED), []
    metrics, steps = score_samples(
        module,
        {"brightness": Brightness()},
        num=20,
        batch_size=6,
        seed=2,
        watch=lambda batch: taken.extend(zip(batch.labels.tolist(), batch.refined.steps.tolist())),
    )
    expected = torch.zeros(5, 9, dtype=torch.long)
    for label, number in taken:
        expected[label, number] += 1
    assert torch.equal(steps, expected)
    numbers = [number for _, number in taken]
    assert metrics == {
        "seen": 20,
        "steps_mean": pytest.approx(sum(numbers) / 20),
        "steps_min": min(numbers),
        "steps_max": max(numbers),
    }
    assert min(numbers) < max(numbers)
    means = [sum(n for label, n in taken if label == c) / 4 for c in range(5)]
    assert steps_by_class(steps) == pytest.approx(means)


def test_the_callback_logs_the_histogram_and_the_classes(tmp_path, monkeypatch):
    logged = []
    wandb_logger = WandbLogger(save_dir=tmp_path, offline=True)
    monkeypatch.setattr(WandbLogger, "log_metrics", lambda self, metrics, step=None: logged.append((metrics, step)))
    callback = EvaluateSamples({"x": lambda **_: Brightness()}, num=20, batch_size=8, cache_dir=str(tmp_path), seed=2)
    module = tiny_module(GUIDED)
    module.validation_step = lambda *_: None
    trainer = Trainer(
        accelerator="cpu", logger=[CSVLogger(tmp_path), wandb_logger], callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.validate(module, torch.utils.data.DataLoader(torch.zeros(1)), verbose=False)

    _, steps = score_samples(module, {}, num=20, batch_size=20, seed=2)
    (path,) = tmp_path.rglob("steps-step0000000.csv")
    with open(path) as file:
        rows = [{key: int(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert sum(row["samples"] for row in rows) == 20
    assert all(steps[row["class"], row["steps"]] == row["samples"] for row in rows)
    media = {key: (value, step) for metrics, step in logged for key, value in metrics.items()}
    histogram, step = media["eval/steps"]
    assert isinstance(histogram, wandb.Histogram)
    assert step == 0
    assert histogram.histogram == steps.sum(dim=0).tolist()
    assert histogram.bins[:2] == [-0.5, 0.5]
    table, _ = media["eval/steps_by_class"]
    assert table.columns == ["class", "steps"]
    assert [row[1] for row in table.data] == pytest.approx(steps_by_class(steps))
