"""The update with memory (docs/method.md#a-sampler-with-memory): Psi-samplers (arXiv 2602.21185) on uniform noise.

The authors' update draws every token anew: prediction k with probability s, else noise. A Psi-update does so with
probability 1 - kappa, and else takes the exact reverse step of the corruption from the signal ratio t to s: of a
token i and its prediction k, among K classes, class j has the probability

    [(t/s) (i = j) + (1 - t/s)/K] [s (j = k) + (1 - s)/K], normalized over j.

A mixture of three: i stays, k takes its place, or any class does. Both keep the share of signal of every t.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from grn.method import philox
from grn.method.philox import Stream

Update = Literal["redraw", "psi"]
Form = Literal["constant", "rescaled"]
UPDATES, FORMS = get_args(Update), get_args(Form)


def reverse_shares(t: Tensor, s: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(P(i stays | i != k), P(k | i != k), P(any class | i = k)) of the reverse step, each float64 [n].

    What is left of the first two is for any class, and what is left of the third for i = k.

    Args:
        t, s: signal ratios before and after, float64 [n], 0 <= t <= s <= 1, t < 1.
    """
    a = torch.where(s > 0, t / s, 1.0)
    left = 1 - a * s
    either = (1 - a) * (1 - s)
    return a * (1 - s) / left, s * (1 - a) / left, either / (1 + (classes - 1) * a * s)


def kappa_at(t: Tensor, s: Tensor, kappa: float, form: Form, window: tuple[float, float]) -> Tensor:
    """kappa of a step from t to s, float64 [n]; 1 (the reverse step alone) where t is outside `low <= t < high`.

    `rescaled`: as ReMDM's rescaled schedule does with masks (arXiv 2503.00307), of the largest share of known tokens
    that may become noise again, min(1, (1 - s)/t), a step takes 1 - kappa.
    """
    value = torch.full_like(t, kappa)
    if form == "rescaled":
        value = (1 - (1 - kappa) * torch.minimum(1 / (1 - s).clamp(min=1e-9), 1 / t.clamp(min=1e-9))).clamp(min=0)
    low, high = window
    return torch.where((t >= low) & (t < high), value, 1.0)


def reverse_step(
    seed: int | Tensor,
    ids: Tensor,
    step: Tensor,
    tokens: Tensor,
    predicted: Tensor,
    shares: tuple[Tensor, ...],
    kappa: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reverse step of some tokens, with probability kappa each.

    Args:
        seed, ids, step: as of `philox.uniform`.
        tokens, predicted: int64 [n, D, T, H, W], of `classes` classes.
        shares: (stays, moves, mixes, classes): of `reverse_shares`, and the number of classes, each [n, 1, 1, 1, 1].
        kappa: likewise.

    Returns:
        (bool: which tokens take it; int64: what they are then; bool: where they are left as they were; bool: where they
        are as predicted), each like `tokens`.
    """
    stays, moves, mixes, classes = shares
    draws = philox.uniform(seed, Stream.REVERSE, ids, step, (2, *tokens.shape[1:]))
    chosen = draws[:, 0] < kappa
    drawn = draws[:, 0] / kappa.clamp(min=2.0**-24)  # uniform again where it is below kappa
    same = tokens == predicted
    is_any = drawn >= torch.where(same, 1 - mixes, stays + moves)
    to_predicted = ~is_any & (same | (drawn < moves))
    moved = torch.where(to_predicted, predicted, torch.where(is_any, (draws[:, 1] * classes).long(), tokens))
    return chosen, moved, chosen & ~is_any & ~to_predicted, chosen & to_predicted
