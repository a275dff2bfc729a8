"""Optimization shared by all modules: parameter groups, warm-up, clipping, finite losses."""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from grn.runtime.errors import UserError, check_number
from grn.training.restoring import REMEDY, check_optimizer_state

log = logging.getLogger(__name__)

Curve = Literal["constant", "cosine"]  # of a learning rate


def check_adamw(*, learning_rate: float, betas: Sequence[float], weight_decay: float) -> None:
    """Raises:
    UserError: a rate or a decay below 0, or a beta outside [0, 1).
    """
    check_number("training.learning_rate", learning_rate, least=0)
    check_number("training.weight_decay", weight_decay, least=0)
    if len(betas) != 2 or not all(isinstance(beta, float | int) and 0 <= beta < 1 for beta in betas):
        raise UserError(f"training.betas={list(betas)} must be two numbers, each at least 0 and below 1")


def adamw(
    network: nn.Module, *, learning_rate: float, betas: Sequence[float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels only: biases and other 1-d parameters (gains) are left alone.

    It keeps these settings when the state of another one is loaded: what was changed for a resumed run takes effect.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, betas=(betas[0], betas[1]), fused=True
    )
    settings = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]

    def keep_settings(loaded: torch.optim.Optimizer) -> None:
        for group, own in zip(loaded.param_groups, settings):
            group.update(own, initial_lr=own["lr"])

    optimizer.register_load_state_dict_pre_hook(check_optimizer_state)
    optimizer.register_load_state_dict_post_hook(keep_settings)
    return optimizer


class Schedule(LambdaLR):
    """A `LambdaLR` that takes nothing but the step from a checkpoint: its rates are those of its own optimizer and
    function. The optimizer's state is loaded first."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = state_dict if isinstance(state_dict, dict) else {}
        step, count = state.get("last_epoch"), state.get("_step_count")
        if type(step) is not int or type(count) is not int or min(step, count) < 0:
            raise UserError(f"ckpt_path: the learning rate's schedule is at step {step}; {REMEDY}")
        self.last_epoch, self._step_count = step, count
        self._last_lr = [rate * factor(self.last_epoch) for rate, factor in zip(self.base_lrs, self.lr_lambdas)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr):
            group["lr"] = rate


def planned_steps(trainer: Trainer) -> int | float:
    """Optimizer steps of the run; infinitely many where `fast_dev_run` breaks it off after a few."""
    return math.inf if getattr(trainer, "fast_dev_run", False) else trainer.max_steps


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, *, name: Curve, warmup_steps: int, total_steps: int | float
) -> Schedule:
    """Linear warm-up, then `constant`, or `cosine` down to a hundredth of the peak at `total_steps`.

    A warm-up that would take the whole run takes a tenth of it instead, with a line in the log.

    Raises:
        UserError: another name, or a cosine without an end.
    """
    if name not in get_args(Curve):
        raise UserError(f"training.lr_schedule must be constant or cosine, got {name!r}")
    if name == "cosine" and total_steps <= 0:
        raise UserError("training.lr_schedule=cosine needs an end: give trainer.max_steps")
    if 0 < total_steps <= warmup_steps:
        shorter = int(total_steps) // 10
        log.info(
            "warm-up: %d steps, as training.warmup_steps=%d is no less than trainer.max_steps", shorter, warmup_steps
        )
        warmup_steps = shorter

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if name == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))

    return Schedule(optimizer, factor)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Clips to `max_norm` (None: only measures) and returns the norm before, a float32 scalar on the device."""
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class FiniteLoss:
    """Notices a loss that is not finite without waiting for the device in every step.

    `watch` only folds the loss into a flag on its device; `check` reads it, whenever something is logged or saved.
    """

    def __init__(self) -> None:
        self._finite: Tensor | None = None

    def watch(self, loss: Tensor) -> None:
        finite = torch.isfinite(loss.detach())
        self._finite = finite if self._finite is None else self._finite & finite

    def check(self, module: LightningModule) -> None:
        """Raises:
        UserError: some loss since the run began was NaN or infinite. No checkpoint is written after it.
        """
        if self._finite is not None and not bool(self._finite):
            raise UserError(
                f"the loss became NaN or infinite by step {module.global_step}: lower training.learning_rate or "
                "training.gradient_clip, then resume with ckpt_path=last"
            )
