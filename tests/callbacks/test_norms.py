"""Norms of blocks, held against their definitions on a step of training."""

import csv

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from grn.callbacks.norms import LogNorms, blocks
from grn.runtime.errors import UserError


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 3)
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(3, 1))
        self.nothing = nn.Identity()

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network, self.seen = Network(), []

    def training_step(self, batch, batch_idx):
        loss = self.network(batch).square().mean()
        with torch.no_grad():
            hidden = self.network.blocks[0](self.network.embed(batch))
        self.seen.append({"weight": self.network.blocks[0].weight.detach().clone(), "hidden": hidden})
        return loss

    def on_after_backward(self):
        block = self.network.blocks[0]
        self.seen[-1]["gradient"] = torch.cat([block.weight.grad.flatten(), block.bias.grad])
        self.seen[-1]["all"] = torch.cat([block.weight.detach().flatten(), block.bias.detach()]).clone()

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.1)


def train(tmp_path, callback, module, steps=4):
    data = DataLoader(torch.randn(8, 2, generator=torch.Generator().manual_seed(1)), batch_size=2)
    logger = CSVLogger(tmp_path, name=None, version="")
    Trainer(
        max_steps=steps, logger=logger, callbacks=[callback], accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1e-6,
    ).fit(module, data)  # fmt: skip
    logger.save()
    path = tmp_path / "metrics.csv"
    return [row for row in csv.DictReader(path.open()) if row.get("norms/weight/embed")] if path.exists() else []


def test_norms_of_every_second_step(tmp_path):
    module = Module()
    rows = train(tmp_path, LogNorms(every_n_steps=2), module)
    assert [int(row["step"]) for row in rows] == [0, 2]
    for row, seen in zip(rows, module.seen[::2]):
        assert float(row["norms/gradient/blocks.0"]) == pytest.approx(seen["gradient"].norm().item(), rel=1e-5)
        assert float(row["norms/weight/blocks.0"]) == pytest.approx(seen["all"].norm().item(), rel=1e-5)
        hidden = seen["hidden"].square().mean().sqrt().item()
        assert float(row["norms/activation/blocks.0"]) == pytest.approx(hidden, rel=1e-5)
    assert not any("nothing" in name for name in rows[0])


def test_off_unless_asked(tmp_path):
    assert train(tmp_path, LogNorms(), Module(), steps=2) == []
    with pytest.raises(UserError, match=r"^callbacks\.norms\.every_n_steps"):
        LogNorms(every_n_steps=-1)


def test_blocks_are_members_of_lists_and_other_parts():
    assert [name for name, _ in blocks(Network())] == ["embed", "blocks.0", "blocks.1", "head"]
    assert [name for name, _ in blocks(nn.ModuleDict({"a": Network()}))][:2] == ["a.embed", "a.blocks.0"]
