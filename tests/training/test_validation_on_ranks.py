"""Validation on two gloo processes that hold different shares of the held-out samples, or none."""

import csv
import io
import os
import socket

import commands
import lightning
import pytest
import torch
from data.tars import write_tar
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from grn.callbacks import ReconstructionGrid, SkippedSamples, Throughput
from grn.data.images import ImageShardsDataModule
from grn.media.pictures import single
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.networks.class_refiner import ClassRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError
from grn.sampling.bundle import RefinerBundle
from grn.training import RefinerModule, TokenizerModule

SIZE = 16


def png(number):
    generator = torch.Generator().manual_seed(number)
    file = io.BytesIO()
    single(torch.randint(256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)).save(file, "png")
    return file.getvalue()


def shard(path, numbers):
    entries = []
    for number in numbers:
        broken = isinstance(number, str)
        entries += [(f"{number}.png", b"no picture" if broken else png(number)), (f"{number}.cls", b"1")]
    return write_tar(path, entries)


def refiner(labels=2):
    network = ClassRefiner(
        channels=3,
        classes=4,
        num_labels=labels,
        size=4,
        depth=2,
        width=16,
        heads=2,
        bottleneck=8,
        context_start=None,
        context_tokens=0,
    )
    network.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(network.head.out.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    return RefinerModule(RefinerBundle(network, tokenizer(), Sampler(Linear(2))))


def tokenizer():
    torch.manual_seed(0)
    return HBQTokenizer(
        latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=(1, 2), blocks_per_stage=1, temporal=(False,)
    )


def autoencoder():
    return TokenizerModule(tokenizer(), perceptual_weight=0.0, gan_weight=0.0)


def fit(build, folder, val, ranks):
    """Two steps, validated after each; {curve: values}, by the logger of this process."""
    train = [shard(folder / f"train-{i}.tar", [*range(10 * i, 10 * i + 4), f"bad{i}"]) for i in range(2)]
    data = ImageShardsDataModule(
        name="x", image_size=SIZE, num_labels=2, batch_size=4, train=train, val=val, rank_streams=2, seed=1
    )
    trainer = lightning.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_steps=2, max_epochs=-1,
        val_check_interval=1, check_val_every_n_epoch=None, num_sanity_val_steps=0, log_every_n_steps=1,
        logger=CSVLogger(folder, name=f"{ranks}"), enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            SkippedSamples(), Throughput(),
            ModelCheckpoint(folder / f"{ranks}", monitor="val/loss" if build is refiner else "val/psnr"),
            *([] if build is refiner else [ReconstructionGrid(folder / "pictures", num=4)]),
        ],
    )  # fmt: skip
    trainer.fit(build(), datamodule=data)
    curves = {}
    for path in sorted(folder.glob(f"{ranks}/*/metrics.csv")):
        for row in csv.DictReader(path.open()):
            for name, value in row.items():
                if value:
                    curves.setdefault(name, []).append(float(value))
    return curves


def run_rank(rank, port, build, folder, val, expected):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            fit(build, folder / f"rank{rank}", val, 2)
        return
    curves = fit(build, folder / f"rank{rank}", val, 2)
    if rank == 0:
        for name, values in expected.items():
            if name.startswith(("val/", "data/")):
                assert curves[name] == pytest.approx(values, rel=1e-4), name
        samples = [a / b for a, b in zip(curves["train/tflops_per_second"], curves["train/images_per_second"])]
        assert samples == pytest.approx([samples[0]] * len(samples))


def on_two_ranks(build, folder, val, expected):
    for rank in range(2):
        (folder / f"rank{rank}").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands.spawn(run_rank, (port, build, folder, val, expected), nprocs=2)


SHARES = {
    "one sample for two ranks": [[20]],
    "broken samples on one rank": [[20, 21, 22], ["a", "b"]],
    "a broken shard on one rank": [None, [20, 21]],
    "three samples": [[20], [21, 22]],
}


@pytest.mark.parametrize(
    ("build", "shares"),
    [
        *((refiner, shares) for shares in SHARES),
        (autoencoder, "one sample for two ranks"),
        (autoencoder, "a broken shard on one rank"),
    ],
)
def test_validation_is_that_of_one_process_whatever_a_rank_holds(tmp_path, build, shares):
    val = []
    for number, samples in enumerate(SHARES[shares]):
        if samples is None:
            (tmp_path / f"{number}.tar").write_bytes(b"no tar" * 1000)
        val.append(str(tmp_path / f"{number}.tar") if samples is None else shard(tmp_path / f"{number}.tar", samples))
    (tmp_path / "alone").mkdir()
    expected = fit(build, tmp_path / "alone", val, 1)
    assert len(expected["val/loss" if build is refiner else "val/psnr"]) == 2
    on_two_ranks(build, tmp_path, val, expected)


def test_held_out_shards_without_a_usable_sample_are_told_at_once(tmp_path):
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 1000)
    val = [str(tmp_path / "broken.tar"), shard(tmp_path / "bad.tar", ["a", "b"])]
    message = r"^data\.val: the held-out shards have no usable sample \(shard broken.*: 1, image cannot be decoded: 2\)"
    (tmp_path / "alone").mkdir()
    with pytest.raises(UserError, match=message):
        fit(refiner, tmp_path / "alone", val, 1)
    with pytest.raises(UserError, match=r"^data\.val: .*\(they are empty\)"):
        fit(refiner, tmp_path / "alone", write_tar(tmp_path / "none.tar", []), 1)
    on_two_ranks(refiner, tmp_path, val, message)
