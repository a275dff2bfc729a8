"""Exponential moving averages of the network, for any number of decays, in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from grn.runtime.errors import UserError
from grn.runtime.trainer import Trainer
from grn.training import AnyModule
from grn.training.fsdp import local, shard_like
from grn.training.restoring import REMEDY, check_weights


class EMA(Callback):
    """Averages `module.network` after every optimizer step: ema = decay*ema + (1 - decay)*weights.

    Validation, and with it every picture and score of a run, sees the average of decay `use`. All of them are in every
    checkpoint, under `ema.<decay>.<parameter>`, by way of the module's `checkpoint_extras`. An average starts from the
    weights, or from the one of its decay among the module's `initial_averages` (of an official file), which are let go
    then. They are sharded as the weights are.

    Args:
        decays: one average each.
        use: the decay that is validated and sampled from; one of `decays`.
        side_stream: average on a stream of its own, while the next batch goes through the network; done before the
            next optimizer step and before anybody looks. On CUDA alone: elsewhere nothing changes.
    """

    def __init__(self, decays: list[float], use: float, side_stream: bool = False):
        if not all(0 <= decay < 1 for decay in decays):
            raise UserError(f"callbacks.ema.decays must be in [0, 1), got {list(decays)}")
        if use not in decays:
            raise UserError(f"callbacks.ema.use={use} is not one of callbacks.ema.decays={list(decays)}")
        if not isinstance(side_stream, bool):
            raise UserError(f"callbacks.ema.side_stream must be true or false, got {side_stream!r}")
        self.side_stream = side_stream
        self.decays = {str(decay): get_ema_multi_avg_fn(decay) for decay in decays}
        self.use = str(use)
        self.averages: dict[str, dict[str, Tensor]] = {}
        self._restored: dict[str, dict[str, Tensor]] | None = None
        self._own: list[Tensor] | None = None
        self._last_step = 0
        self._stream: torch.cuda.Stream | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: AnyModule) -> None:
        trained = _trained(pl_module)
        initial = getattr(pl_module, "initial_averages", {})
        for decay in self.decays:
            restored = (self._restored or {}).get(decay)
            if self._restored is not None and restored is None:
                raise UserError(
                    f"callbacks.ema.decays={list(self.decays)}: the checkpoint holds {list(self._restored)} only; "
                    "use the decays it was trained with"
                )
            if restored is not None:
                check_weights(trained, restored, f"the average of decay {decay}")
            source = initial.get(decay, trained) if restored is None else restored
            self.averages[decay] = {
                name: shard_like(parameter, source[name]).detach().to(parameter.device, torch.float32, copy=True)
                for name, parameter in trained.items()
            }
        self._restored = None
        pl_module.initial_averages = {}
        # The module's, so that checkpoints without the state of callbacks and optimizers have them, too.
        pl_module.checkpoint_extras |= {"ema": self.averages, "ema_use": self.use}
        self._last_step = trainer.global_step
        self._stream = _stream_on(pl_module.device) if self.side_stream else None

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: AnyModule, *_: Any) -> None:
        if trainer.global_step == self._last_step:  # gradients are still being accumulated
            return
        self._last_step = trainer.global_step
        with self._aside():
            weights = [local(p.detach()).float() for p in _trained(pl_module).values()]
            for decay, average in self.decays.items():
                average([local(a) for a in self.averages[decay].values()], weights, trainer.global_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: AnyModule, *_: Any) -> None:
        self._join()  # which changes the weights that averages are made of

    def on_train_end(self, trainer: Trainer, pl_module: AnyModule) -> None:
        self._join()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What is asked of the device within starts when all before is done, and nothing after waits for it."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def _join(self) -> None:
        """What is asked of the device from now on waits for the averages. Checkpoints wait by themselves, since those
        without optimizers ask no callback (`grn.training.checkpoint_io.finish`)."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def on_validation_start(self, trainer: Trainer, pl_module: AnyModule) -> None:
        self._join()
        if self.averages and self._own is None:
            self._own = [p.detach().clone() for p in _trained(pl_module).values()]
            _copy(list(self.averages[self.use].values()), pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: AnyModule) -> None:
        if self._own is not None:
            _copy(self._own, pl_module)
            self._own = None

    def on_exception(self, trainer: Trainer, pl_module: AnyModule, exception: BaseException) -> None:
        self._join()
        if not isinstance(pl_module.network, FSDPModule):  # which may have broken off within its forward pass
            self.on_validation_end(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: AnyModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get("ema", {})
        if not isinstance(self._restored, dict):
            raise UserError(f"ckpt_path: its ema does not hold averages by decay; {REMEDY}")


def _stream_on(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _trained(module: AnyModule) -> dict[str, Tensor]:
    return {name: p for name, p in module.network.named_parameters() if p.requires_grad}


@torch.no_grad()
def _copy(source: list[Tensor], module: AnyModule) -> None:
    for parameter, value in zip(_trained(module).values(), source):
        parameter.copy_(value)
