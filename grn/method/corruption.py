"""The training objective: predict clean tokens from a corrupted map (docs/method.md#training-objective)."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from grn.method import philox
from grn.method.philox import Stream

Real = TypeVar("Real", Tensor, float)


def signal_ratio(seed: int, ids: Tensor, step: int, *, mean: float, std: float, alpha: float = 1.0) -> Tensor:
    """Training's signal ratios t = shift(sigmoid(std*n + mean), alpha), n ~ N(0, 1): float32 [B] in (0, 1).

    Class-conditional refiners use mean -0.8 and std 0.8, text refiners -1.3 and 1.3. `ids` int64 [B] are positions in
    the global batch, `step` is the optimizer step: the draw does not depend on how the batch is spread over ranks.
    """
    t = torch.sigmoid(philox.normal(seed, Stream.SIGNAL_RATIO, ids, step) * std + mean)
    return t if alpha == 1 else shift(t, alpha)


def corrupt(tokens: Tensor, t: Tensor, classes: int, *, seed: int, ids: Tensor, step: int) -> Tensor:
    """Keeps each token with probability t, else draws it anew, uniformly over the classes.

    Args:
        tokens: int64 [B, D, T, H, W].
        t: float [B], the signal ratio of each sample.
        seed, ids, step: as in `signal_ratio`.

    Returns:
        int64 [B, D, T, H, W].
    """
    shape = tuple(tokens.shape[1:])
    keep = _keep(shape, t, seed=seed, ids=ids, step=step)
    return torch.where(keep, tokens, philox.integers(seed, Stream.NOISE, ids, step, shape, classes))


def realized_ratio(shape: tuple[int, ...], t: Tensor, *, seed: int, ids: Tensor, step: int) -> Tensor:
    """The share of tokens that `corrupt` keeps of each sample: float32 [B].

    Args:
        shape: (D, T, H, W) of one sample.
        t, seed, ids, step: as in `corrupt`.
    """
    return _keep(shape, t, seed=seed, ids=ids, step=step).flatten(1).float().mean(dim=1)


def _keep(shape: tuple[int, ...], t: Tensor, *, seed: int, ids: Tensor, step: int) -> Tensor:
    return philox.uniform(seed, Stream.KEEP, ids, step, shape) < t.view(-1, *[1] * len(shape))


def shift(t: Real, alpha: float) -> Real:
    """Moves signal ratios towards noise for alpha > 1: with u = 1 - t, t' = 1 - alpha*u / (1 + (alpha - 1)*u)."""
    u = 1 - t
    return 1 - alpha * u / (1 + (alpha - 1) * u)


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in float32, in nats a token; logits [B, classes, D, ...] against true tokens [B, D, ...]."""
    return F.cross_entropy(logits.float(), tokens)


def token_accuracy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Share of tokens whose most likely class is the true one, for each sample: float32 [B]."""
    return (logits.argmax(dim=1) == tokens).flatten(1).float().mean(dim=1)


def mean_scores(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(Mean cross-entropy, accuracy) of each row, float32 [R]: logits [R, classes, n] against true tokens [R, n]."""
    losses = F.cross_entropy(logits.float(), tokens, reduction="none")
    return losses.mean(dim=1), token_accuracy(logits.detach(), tokens)


def per_sample(logits: Sequence[Tensor], tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(Mean cross-entropy, accuracy) of samples of any sizes, float32 [S] each; as `token_loss` and `token_accuracy`.

    Args:
        logits: S times [classes, D, ...].
        tokens: S times int64 [D, ...].
    """
    flat = torch.cat([sample.float().flatten(1) for sample in logits], dim=1)[None]
    target = torch.cat([sample.flatten() for sample in tokens])[None]
    losses = F.cross_entropy(flat, target, reduction="none")[0]
    right = (flat.detach().argmax(dim=1) == target)[0].float()
    counts = [sample.numel() for sample in tokens]
    loss, accuracy = (torch.stack([own.mean() for own in values.split(counts)]) for values in (losses, right))
    return loss, accuracy


def weighted_sums(losses: Tensor, positions: Sequence[int], power: float) -> Tensor:
    """(Sum of w*loss, sum of w) of samples, w = positions**power: [2], to be added over batches and ranks.

    Their quotient is the loss of packed samples, after the authors' release: 0 counts samples alike, and 0.5 is what
    the newer weights were trained with.

    Args:
        losses: float32 [S], the mean of each sample.
        positions: how many are predicted in each; context has no loss and does not count.
    """
    weights = torch.tensor(positions, dtype=torch.float32).to(losses.device, non_blocking=True) ** power
    return torch.stack([(weights * losses).sum(), weights.sum()])
