import csv

import pytest
import torch
import wandb
from lightning import LightningDataModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from test_generation import GUIDED, tiny_bundle

from grn.callbacks import EvaluateSamples
from grn.evaluation.scoring import real_splits, score_reconstructions, score_samples, steps_by_class
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError
from grn.sampling.bundle import RefinerBundle
from grn.sampling.generation import generate
from grn.sampling.refinement import Refined
from grn.sampling.request import Request
from grn.training import RefinerModule


class Brightness:
    def reset(self):
        self.seen = []

    def update(self, images, labels, ids):
        self.seen += ids.tolist()

    def compute(self):
        assert sorted(self.seen) == list(range(20))
        return {"seen": float(len(self.seen))}


def test_scores_need_real_data():
    with pytest.raises(UserError, match="scores read real data, which LightningDataModule does not give"):
        real_splits(LightningDataModule())


def test_steps_are_counted_by_class():
    module, taken = tiny_bundle(GUIDED), []
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


def test_samples_are_decoded_a_few_at_a_time_and_only_for_those_who_ask(monkeypatch):
    module, decoded = tiny_bundle(GUIDED), []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda tokens: decoded.append(tokens.shape) or decode(tokens))
    _, steps = score_samples(module, {}, num=20, batch_size=20, seed=2)
    assert decoded == []
    monkeypatch.setattr("grn.sampling.generation.DECODED_PIXELS", 3 * 16 * 16 + 1)
    _, same = score_samples(module, {"brightness": Brightness()}, num=20, batch_size=20, seed=2)
    assert torch.equal(steps, same)
    assert sum(count for count, *_ in decoded) == 20
    assert max(count for count, *_ in decoded) == 3


@pytest.mark.parametrize("of_long", [False, True])
def test_clips_are_decoded_a_few_at_a_time_and_long_ones_in_a_stream(monkeypatch, of_long):
    class Clips(RefinerBundle):
        token_shape = (3, 3, 4, 4)  # of 5 frames of 16x16

    tiny = tiny_bundle(GUIDED)
    tokenizer = HBQTokenizer(
        latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=(1, 2), blocks_per_stage=1, temporal=(True,)
    )
    module, seen = Clips(tiny.network, tokenizer, tiny.sampler).eval(), []
    tokens = torch.randint(4, (4, 3, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    rest = [torch.arange(4) for _ in range(4)]
    monkeypatch.setattr(module, "generate_queue", lambda *_, **__: [(torch.arange(4), Refined(tokens, *rest))])
    tokenizer.decoder.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[::2][:2])))
    monkeypatch.setattr("grn.sampling.generation.DECODED_PIXELS", 5 * 16 * 16 * 2 - 1 - of_long * 5 * 16 * 16)
    batches = list(generate(module, Request(num=4), batch_size=4))
    assert [batch.ids.tolist() for batch in batches] == [[0], [1], [2], [3]]
    images = [batch.images for batch in batches]
    assert seen == 4 * [(1, 1)]  # their first latents alone
    seen.clear()
    pixels = torch.cat([batch.pixels for batch in batches])
    assert seen == 4 * ([(1, 1)] * 3 if of_long else [(1, 3)])
    expected = module.decode(tokens)
    assert pixels.shape == (4, 3, 5, 16, 16)
    assert (pixels.int() - expected.int()).abs().max() <= 1
    assert (torch.cat(images).int() - expected[:, :, 0].int()).abs().max() <= 1


def test_the_callback_logs_the_histogram_and_the_classes(tmp_path, monkeypatch):
    logged = []
    wandb_logger = WandbLogger(save_dir=tmp_path, offline=True)
    monkeypatch.setattr(WandbLogger, "log_metrics", lambda self, metrics, step=None: logged.append((metrics, step)))
    callback = EvaluateSamples({"x": lambda **_: Brightness()}, num=20, batch_size=8, cache_dir=str(tmp_path), seed=2)
    bundle = tiny_bundle(GUIDED)
    module = RefinerModule(bundle)
    module.validation_step = lambda *_: None
    module.on_validation_epoch_end = lambda: None  # which has no loss to tell
    trainer = Trainer(
        accelerator="cpu", logger=[CSVLogger(tmp_path), wandb_logger], callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.validate(module, torch.utils.data.DataLoader(torch.zeros(1)), verbose=False)

    _, steps = score_samples(bundle, {}, num=20, batch_size=20, seed=2)
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


class Seen:
    """Keeps what it is given, and reports how much of it there was."""

    def __init__(self, name, reads_clips):
        self.name, self.reads_clips, self.seen = name, reads_clips, []

    def update(self, pixels, labels, ids):
        self.seen.append((pixels, labels, ids))

    def compute(self):
        return {self.name: float(sum(len(pixels) for pixels, _, _ in self.seen))}


class Reconstructed:
    """A held-out split of two batches, as a datamodule gives it."""

    def __init__(self, frames, labels):
        pixels = torch.randint(256, (5, 3, frames, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
        self.batches = [
            {"pixels": pixels[part], "key": [f"{i}" for i in range(5)][part]}
            | ({"label": torch.arange(5)[part]} if labels else {})
            for part in (slice(3), slice(3, 5))
        ]

    def split_dataloader(self, split, *, share):
        assert (split, share) == ("val", True)
        return self.batches


@pytest.mark.parametrize("labels", [True, False])
def test_reconstructions_are_scored_as_clips_or_as_images(labels, caplog):
    torch.manual_seed(0)
    network = HBQTokenizer(
        latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=(1, 1, 1), blocks_per_stage=1,
        temporal=(True, True),
    )  # fmt: skip
    scores = {"fid": Seen("fid", False), "fvd": Seen("fvd", True)}
    metrics = score_reconstructions(network, scores, Reconstructed(5, labels))
    assert (metrics["rfid"], metrics["rfvd"]) == (25, 5)
    clips, of_clips, ids = (torch.cat(x) if x[0] is not None else None for x in zip(*scores["fvd"].seen))
    images, of_images, ids_of_images = (torch.cat(x) if x[0] is not None else None for x in zip(*scores["fid"].seen))
    assert clips.shape == (5, 3, 5, 16, 16)
    assert clips.dtype == torch.uint8
    assert torch.equal(images, clips.transpose(1, 2).flatten(0, 1))
    assert torch.equal(ids_of_images, ids.repeat_interleave(5))
    if labels:
        assert of_clips.tolist() == list(range(5))
        assert torch.equal(of_images, of_clips.repeat_interleave(5))
    else:
        assert of_clips is None
        assert of_images is None
    assert "left out" not in caplog.text

    scores = {"fid": Seen("fid", False), "fvd": Seen("fvd", True)}
    metrics = score_reconstructions(network, scores, Reconstructed(1, labels))
    assert metrics["rfid"] == 5
    assert "rfvd" not in metrics
    assert "scores.fvd reads clips, and there are images alone: left out" in caplog.text
