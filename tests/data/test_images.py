"""The datamodule of images: its batches, its checks, and a Lightning run that breaks off and goes on."""

import io
import json
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
import webdataset as wds
from omegaconf import OmegaConf
from PIL import Image

from grn.data.images import ImageShardsDataModule
from grn.runtime.errors import UserError
from grn.toys.digits import DigitsSource


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "digits"
    DigitsSource().write(root)
    return root


def datamodule(root=None, **arguments):
    return ImageShardsDataModule(
        **({"name": "digits", "root": root, "image_size": 32, "num_labels": 10, "batch_size": 20} | arguments)
    )


def as_rank(monkeypatch, rank, world_size):
    for module in ("stream.streaming", "stream.endless", "datamodule"):
        monkeypatch.setattr(f"grn.data.{module}.rank_and_world_size", lambda: (rank, world_size))


def test_batches_are_as_agreed(root):
    data = datamodule(root, num_workers=1)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["pixels"].shape == (20, 3, 1, 32, 32)
    assert batch["pixels"].dtype == torch.uint8
    assert batch["label"].shape == (20,)
    assert batch["label"].dtype == torch.int64
    for label, caption in zip(batch["label"], batch["caption"], strict=True):
        assert caption == f"a handwritten {data.label_names[label]}"
    assert len(set(batch["key"])) == 20
    assert data.num_train_samples == 1500
    assert data.skipped() == {}


@pytest.mark.parametrize(("split", "samples"), [("train", 1500), ("val", 297)])
def test_a_split_is_read_whole_in_one_order(root, split, samples, monkeypatch):
    as_rank(monkeypatch, 1, 2)
    data = datamodule(root, eval_batch_size=100)
    keys = [[key for batch in data.split_dataloader(split) for key in batch["key"]] for _ in range(2)]
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == len(keys[0]) == samples


def test_validation_gives_each_sample_once_over_ranks(root, monkeypatch):
    keys = []
    for rank in range(6):
        as_rank(monkeypatch, rank, 6)
        keys += [key for batch in datamodule(root, batch_size=60).val_dataloader() for key in batch["key"]]
    assert len(keys) == len(set(keys)) == 297


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_split_is_shared_by_the_ranks(root, monkeypatch, num_workers):
    """More readers than the four shards held out, too."""
    keys = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        data = datamodule(root, eval_batch_size=100, num_workers=num_workers)
        own = [key for batch in data.split_dataloader("val", share=True) for key in batch["key"]]
        assert 0 < len(own) < 297
        keys += own
    assert len(keys) == len(set(keys)) == 297


def test_the_batch_is_shared_by_the_ranks(root, monkeypatch):
    whole = next(iter(datamodule(root, rank_streams=4).train_dataloader()))["key"]
    for rank in range(4):
        as_rank(monkeypatch, rank, 4)
        assert next(iter(datamodule(root, rank_streams=4).train_dataloader()))["key"] == whole[rank::4]
    as_rank(monkeypatch, 0, 3)
    with pytest.raises(UserError, match=r"data\.batch_size=20 does not divide over 3 ranks"):
        datamodule(root).setup("fit")


def test_loaders_leave_the_global_generator_alone(root):
    data = datamodule(root)
    before = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size=0"),
        ({"num_workers": -1}, r"data\.num_workers=-1"),
        ({"rank_streams": 0}, r"data\.rank_streams=0"),
        ({"num_workers": 2}, r"data\.num_workers=2 cannot share data\.worker_streams=1: .*data\.worker_streams=2"),
        ({"rank_streams": 11}, r"data\.rank_streams=11 .*needs 11 training shards, there are only 10"),
        ({"num_labels": 9}, r"data\.num_labels=9, but .* has 10 labels"),
        ({"root": None}, r"data\.train and data\.root are both null"),
        (
            {"root": "/nowhere"},
            r"data\.train: no shards at /nowhere/train-\*\.tar; .*python -m grn\.prepare data=digits",
        ),
        ({"train": "/nowhere/{0..9}.tar"}, r"data\.train: no shard at /nowhere/0\.tar; .*python -m grn\.prepare"),
    ],
)
def test_wrong_keys_are_named(root, arguments, message):
    def start():
        data = datamodule(**({"root": root} | arguments))
        data.setup("fit")
        data.train_dataloader()

    with pytest.raises(UserError, match=message) as caught:
        start()
    assert "\n" not in str(caught.value)


def test_damaged_root_is_noticed_before_anything_starts(tmp_path):
    DigitsSource(train_shards=2).write(tmp_path / "digits")
    shard = tmp_path / "digits" / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"train-000001\.tar has 5000 bytes .*python -m grn\.prepare data=digits"):
        datamodule(tmp_path / "digits").setup("fit")


def photograph(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="JPEG")
    return data.getvalue()


@pytest.fixture
def foreign(tmp_path):
    """Two shards as somebody else would write them, without a manifest; one sample in four is unusable."""
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"train-{shard}.tar"), encoder=False) as tar:
            for i in range(8):
                label = b"99" if i % 4 == 3 else b"%d" % i
                tar.write({"__key__": f"{shard}-{i}", "jpg": photograph(20 + i, 30, i), "cls": label})
    return tmp_path


def test_somebody_elses_shards(foreign):
    data = datamodule(root=foreign, val=str(foreign / "train-0.tar"), image_size=8, center_crop=True, batch_size=6)
    data.setup("fit")
    assert data.label_names is None
    batch = next(iter(data.train_dataloader()))
    assert batch["pixels"].shape == (6, 3, 1, 8, 8)
    assert "caption" not in batch
    data = datamodule(root=foreign, image_size=8, center_crop=True, num_workers=2)
    assert sum(len(batch["key"]) for batch in data.split_dataloader("train")) == 12
    assert data.skipped() == {"label out of range": 4}
    with pytest.raises(UserError, match=r"data\.train_samples"):
        _ = data.num_train_samples
    assert datamodule(root=foreign, train_samples=12).num_train_samples == 12


def test_all_bad_is_one_error_through_a_worker(foreign):
    data = datamodule(root=foreign, image_size=8, num_workers=1)
    with pytest.raises(UserError, match=r"no usable sample \(.*image of another size: 96") as caught:
        next(iter(data.train_dataloader()))
    assert "\n" not in str(caught.value)


def test_flips_are_for_training_alone(root):
    straight = {key: p for b in datamodule(root).split_dataloader("train") for key, p in zip(b["key"], b["pixels"])}
    data = datamodule(root, flip=True, batch_size=200)
    batch = next(iter(data.train_dataloader()))
    flipped = [torch.equal(p, straight[key].flip(-1)) for key, p in zip(batch["key"], batch["pixels"])]
    assert 60 < sum(flipped) < 140
    for batch in data.split_dataloader("train"):
        assert all(torch.equal(p, straight[key]) for key, p in zip(batch["key"], batch["pixels"]))


class Recorder(lightning.LightningModule):
    """Trains one number, and notes which samples came."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.keys = []
        self.validated = []

    def training_step(self, batch, _):
        self.keys.append(batch["key"])
        return self.weight * batch["pixels"].float().mean()

    def validation_step(self, batch, _):
        self.validated += batch["key"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


DATA = {"batch_size": 100, "rank_streams": 2, "worker_streams": 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_lightning_run_goes_on_where_it_broke_off(root, tmp_path, workers):
    def run(max_steps, total, ckpt_path=None, workers=workers):
        module = Recorder()
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=total,
            max_epochs=-1,
            accumulate_grad_batches=2,
            val_check_interval=8,
            check_val_every_n_epoch=None,
            logger=False,
            callbacks=[StopAt(max_steps)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, datamodule=datamodule(root, num_workers=workers, **DATA), ckpt_path=ckpt_path)
        return trainer, module

    class StopAt(lightning.Callback):
        def __init__(self, step):
            self.step = step

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step >= self.step:
                trainer.save_checkpoint(tmp_path / "broken.ckpt")
                trainer.should_stop = True

    _, unbroken = run(12, 12)
    assert len(unbroken.keys) == 24
    _, first = run(5, 12)
    assert len(first.keys) == 10
    trainer, second = run(12, 12, ckpt_path=tmp_path / "broken.ckpt", workers=2 - workers)
    assert trainer.global_step == 12
    assert first.keys + second.keys == unbroken.keys
    assert torch.equal(second.weight, unbroken.weight)
    assert len(set(second.validated)) == 297


@pytest.mark.parametrize("name", ["digits", "imagenet"])
def test_config_fits_the_datamodule(name):
    conf = Path(__file__).parents[2] / "conf"
    config = OmegaConf.create({"seed": 3, "paths": {"data": "/somewhere"}})
    config.data = OmegaConf.load(conf / "data" / f"{name}.yaml")
    arguments = OmegaConf.to_container(config, resolve=True)["data"]
    assert arguments.pop("_target_") == "grn.data.images.ImageShardsDataModule"
    data = ImageShardsDataModule(**arguments)
    assert (data.name, data.seed) == (name, 3)
    assert str(data.root).startswith("/somewhere/")


def test_digits_config_writes_what_the_digits_config_reads(tmp_path):
    conf = Path(__file__).parents[2] / "conf"
    config = OmegaConf.create({"seed": 0, "paths": {"data": str(tmp_path)}})
    config.data = OmegaConf.load(conf / "data" / "digits.yaml")
    config.source = OmegaConf.load(conf / "source" / "digits.yaml")
    values = OmegaConf.to_container(config, resolve=True)
    assert values["source"].pop("_target_") == "grn.toys.digits.DigitsSource"
    DigitsSource(**values["source"]).write(values["data"]["root"])
    manifest = json.loads(Path(values["data"]["root"], "manifest.json").read_text())
    for key in ("image_size", "num_labels", "name"):
        assert manifest[key] == values["data"][key]
    assert manifest["splits"]["train"]["samples"] == values["data"]["train_samples"]
    streams = values["data"]["rank_streams"] * values["data"]["worker_streams"]
    assert len(manifest["splits"]["train"]["shards"]) >= streams
