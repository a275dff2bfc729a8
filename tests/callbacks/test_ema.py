from contextlib import contextmanager

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn

from grn.callbacks import EMA
from grn.runtime.errors import UserError
from grn.training.checkpoint_io import CheckpointIO


class Module(LightningModule):
    """A linear network on a constant gradient: its weights after every step are recorded."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(3, 1)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.history, self.validated = [], []
        self.checkpoint_extras = {}

    def training_step(self, batch, batch_idx):
        return self.network(batch).sum()

    def on_train_batch_end(self, *_):
        self.history.append(self.network.weight.detach().clone())

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.network.weight.detach().clone())

    def on_save_checkpoint(self, checkpoint):
        checkpoint.update(self.checkpoint_extras)

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.1)


def fit(folder, ema, *, steps, accumulate=1, ckpt_path=None, module=None):
    module = module or Module()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[ema], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0,
        accumulate_grad_batches=accumulate, val_check_interval=4, check_val_every_n_epoch=None,
    )  # fmt: skip
    batches = torch.utils.data.DataLoader(torch.arange(24.0).view(8, 3))
    trainer.fit(module, batches, batches, ckpt_path=ckpt_path, weights_only=True)
    return trainer, module


def test_averages_follow_the_formula_and_validation_sees_the_chosen_one(tmp_path):
    ema = EMA([0.5, 0.9], use=0.9)
    module = Module()
    start = module.network.weight.detach().clone()
    _, module = fit(tmp_path, ema, steps=4, module=module)
    for decay in (0.5, 0.9):
        expected = start
        for weights in module.history:
            expected = decay * expected + (1 - decay) * weights
        torch.testing.assert_close(ema.averages[str(decay)]["weight"], expected)
    assert torch.equal(module.validated[0], ema.averages["0.9"]["weight"])
    assert torch.equal(module.network.weight, module.history[-1])  # put back after validation
    assert set(ema.averages["0.5"]) == {"weight", "bias"}


def test_one_average_an_optimiser_step_under_accumulation(tmp_path):
    ema = EMA([0.5], use=0.5)
    module = Module()
    start = module.network.weight.detach().clone()
    _, module = fit(tmp_path, ema, steps=2, accumulate=2, module=module)
    expected = start
    for weights in module.history[1::2]:
        expected = 0.5 * expected + 0.5 * weights
    torch.testing.assert_close(ema.averages["0.5"]["weight"], expected)


def test_checkpoint_carries_all_averages_and_restores_them(tmp_path):
    ema = EMA([0.5, 0.9], use=0.5)
    trainer, _ = fit(tmp_path, ema, steps=4)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    contents = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(contents["ema"]) == {"0.5", "0.9"}
    assert contents["ema_use"] == "0.5"
    again = EMA([0.5, 0.9], use=0.5)
    fit(tmp_path, again, steps=4, ckpt_path=tmp_path / "x.ckpt")
    for decay in ("0.5", "0.9"):
        assert torch.equal(again.averages[decay]["weight"], contents["ema"][decay]["weight"])


def test_other_decays_than_the_checkpoint_are_refused(tmp_path):
    trainer, _ = fit(tmp_path, EMA([0.5], use=0.5), steps=4)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"callbacks.ema.decays"):
        fit(tmp_path, EMA([0.7], use=0.7), steps=8, ckpt_path=tmp_path / "x.ckpt")


def test_averages_that_the_weights_came_with_go_on(tmp_path):
    module, ema = Module(), EMA([0.5, 0.9], use=0.9)
    start = module.network.weight.detach().clone()
    module.initial_averages = {"0.9": {"weight": start + 1, "bias": torch.ones(1)}, "0.7": {"weight": start}}
    trainer, module = fit(tmp_path, ema, steps=2, module=module)
    for decay, expected in ((0.9, start + 1), (0.5, start)):
        for weights in module.history:
            expected = decay * expected + (1 - decay) * weights
        torch.testing.assert_close(ema.averages[str(decay)]["weight"], expected)
    assert module.initial_averages == {}

    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again, module = EMA([0.5, 0.9], use=0.9), Module()
    module.initial_averages = {"0.9": {"weight": start + 9, "bias": torch.ones(1)}}
    fit(tmp_path, again, steps=2, ckpt_path=tmp_path / "x.ckpt", module=module)
    assert torch.equal(again.averages["0.9"]["weight"], ema.averages["0.9"]["weight"])  # those of the checkpoint win


class Stream:
    """In place of CUDA's: what is asked of it and in which order is written down."""

    def __init__(self, name, events):
        self.name, self.events, self.device = name, events, None

    def wait_stream(self, other):
        self.events.append((self.name, "waits"))


class Watched(Module):
    events = ()

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.events.append(("main", "step")))
        return optimizer

    def validation_step(self, batch, batch_idx):
        self.events.append(("main", "validation"))
        super().validation_step(batch, batch_idx)


def test_on_a_side_stream_averages_are_made_between_two_steps_and_done_before_anybody_looks(tmp_path, monkeypatch):
    events, now = [], ["main"]
    main, side = (Stream(name, events) for name in ("main", "side"))
    plain, aside = EMA([0.5, 0.9], use=0.9), EMA([0.5, 0.9], use=0.9, side_stream=True)
    torch.manual_seed(0)
    fit(tmp_path, plain, steps=6, accumulate=2)

    @contextmanager
    def on(stream):
        now.append(stream.name)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr("grn.callbacks.ema._stream_on", lambda device: side)
    for decay, average in list(aside.decays.items()):
        aside.decays[decay] = lambda *given, average=average: (events.append((now[-1], "average")), average(*given))
    torch.manual_seed(0)
    module = Watched()
    module.events = events
    fit(tmp_path, aside, steps=6, accumulate=2, module=module)

    assert ("main", "average") not in events
    # After a step the side waits for it, then averages; before the next one the main stream waits for the side.
    kinds = [event for event in events if event[1] != "validation"]
    one = [("main", "waits"), ("main", "step"), ("side", "waits"), ("side", "average"), ("side", "average")]
    steps = [place for place, event in enumerate(kinds) if event == ("main", "step")]
    assert len(steps) == 6
    for place in steps:
        assert kinds[place - 1 : place + 4] == one
    first = events.index(("main", "validation"))
    before = events[:first]
    last = len(before) - 1 - before[::-1].index(("side", "average"))
    assert ("main", "waits") in before[last:]
    assert events[-1] == ("main", "waits")
    for decay, average in plain.averages.items():
        assert torch.equal(aside.averages[decay]["weight"], average["weight"])


def test_on_a_cpu_the_side_stream_is_the_only_one(tmp_path):
    torch.manual_seed(0)
    plain, aside = EMA([0.5], use=0.5), EMA([0.5], use=0.5, side_stream=True)
    start = Module()
    fit(tmp_path, plain, steps=3, module=start)
    torch.manual_seed(0)
    fit(tmp_path, aside, steps=3)
    assert torch.equal(aside.averages["0.5"]["weight"], plain.averages["0.5"]["weight"])


@pytest.mark.parametrize(("decays", "use"), [([0.9], 0.8), ([1.0], 1.0)])
def test_wrong_decays_name_the_key(decays, use):
    with pytest.raises(UserError, match=r"callbacks\.ema"):
        EMA(decays, use)


def test_a_wrong_side_stream_names_the_key():
    with pytest.raises(UserError, match=r"callbacks\.ema\.side_stream must be true or false, got 'yes'"):
        EMA([0.9], 0.9, side_stream="yes")


def test_checkpoints_wait_for_every_stream(tmp_path, monkeypatch):
    """Also those without optimisers, of which callbacks hear nothing."""
    events, save = [], torch.save
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("waits"))
    monkeypatch.setattr(torch, "save", lambda *given: (events.append("saves"), save(*given)))
    CheckpointIO().save_checkpoint({"a": 1}, tmp_path / "x.ckpt")
    assert events == ["waits", "saves"]
