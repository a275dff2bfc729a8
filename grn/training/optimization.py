"""What both modules share of optimisation: parameter groups, warm-up, clipping with the norm logged, finite losses."""

import math
from collections.abc import Iterable

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from grn.errors import UserError


def adamw(
    network: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels only: biases and other 1-d parameters (gains) are left alone."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, betas=tuple(betas), fused=True
    )


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, *, name: str, warmup_steps: int, total_steps: int
) -> LambdaLR:
    """Linear warm-up, then `constant`, or `cosine` down to a hundredth of the peak at `total_steps`.

    Raises:
        UserError: another name, or a cosine without an end.
    """
    if name not in ("constant", "cosine"):
        raise UserError(f"training.lr_schedule must be constant or cosine, got {name!r}")
    if name == "cosine" and total_steps <= warmup_steps:
        raise UserError("training.lr_schedule=cosine needs trainer.max_steps beyond training.warmup_steps")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if name == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


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
                "training.gradient_clip, then go on from the last checkpoint with ckpt_path=last"
            )
