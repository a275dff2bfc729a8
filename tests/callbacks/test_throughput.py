import csv

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from grn.callbacks import Throughput, throughput
from grn.method.sampler import Sampler
from grn.networks.class_refiner import ClassRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.flops import forward_flop, training_flop
from grn.sampling.bundle import RefinerBundle
from grn.training import RefinerModule, TokenizerModule

FLOP = 10**9


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Linear(3, 1)

    def flop_per_sample(self, batch):
        return FLOP

    def training_step(self, batch, batch_idx):
        return self.network(batch["x"]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.1)


def curves(folder):
    trainer = Trainer(
        accelerator="cpu", max_steps=6, max_epochs=-1, callbacks=[Throughput()], logger=CSVLogger(folder),
        log_every_n_steps=2, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        precision="bf16-mixed",
    )  # fmt: skip
    data = [{"x": torch.ones(3), "key": str(i)} for i in range(20)]
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=2))
    with open(next(folder.rglob("metrics.csv"))) as file:
        return list(csv.DictReader(file))


def test_curves_agree_with_each_other(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        throughput, "get_available_flops", lambda device, dtype: asked.append((device.type, dtype)) or 1e15
    )
    rows = curves(tmp_path)
    assert [int(row["step"]) for row in rows] == [1, 3, 5]
    for row in rows:
        speed = float(row["train/images_per_second"])
        assert speed > 0
        assert float(row["train/tflops_per_second"]) == pytest.approx(speed * FLOP / 1e12)
        assert float(row["train/mfu"]) == pytest.approx(speed * FLOP / 1e15)
    assert asked == [("cpu", torch.bfloat16)]


def test_no_share_of_a_peak_that_nobody_knows(tmp_path):
    for row in curves(tmp_path):
        assert float(row["train/tflops_per_second"]) > 0
        assert "train/mfu" not in row


def tokenizer():
    return HBQTokenizer(latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=(1, 2), temporal=(False,))


def test_refiner_counts_the_encoder_where_there_are_pixels():
    network = ClassRefiner(
        channels=3, classes=4, num_labels=5, size=4, depth=2, width=16, heads=2, bottleneck=8, context_start=1,
        context_tokens=2,
    )  # fmt: skip
    module = RefinerModule(RefinerBundle(network, tokenizer(), Sampler()))
    module.setup("fit")
    from_bits = module.flop_per_sample({"bits": torch.zeros(7, 12)})
    pixels = {"pixels": torch.zeros(7, 3, 1, 16, 16, dtype=torch.uint8)}
    image = torch.empty(1, 3, 1, 16, 16, device="meta")
    encoding = forward_flop(module.tokenizer, lambda copy: copy.encode(image))
    assert module.flop_per_sample(pixels) - from_bits == encoding > 0
    given = torch.zeros(1, 3, 1, 4, 4).long(), torch.zeros(1), torch.zeros(1).long()
    assert from_bits == training_flop(network, lambda copy: copy(*(tensor.to("meta") for tensor in given)))


def test_tokenizer_counts_each_shape():
    module = TokenizerModule(tokenizer(), gan_weight=0.0, perceptual_weight=0.0)
    small, large = ({"pixels": torch.zeros(2, 3, 1, side, side)} for side in (16, 32))
    once, more = module.flop_per_sample(small), module.flop_per_sample(large)
    assert more > 3.9 * once > 0
