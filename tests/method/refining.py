"""Refines whole batches, with arguments as of `Refinement`."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from grn.method.sampler import Condition, Sampler, Step
from grn.sampling.refinement import Refined, Refinement, finished

Predict = Callable[[Tensor, Tensor, Condition], Tensor]


def refine(predict: Predict, condition: Condition, sampler: Sampler, *, ids: Tensor, **settings: Any) -> Refined:
    """Refines random tokens into one batch of samples; arguments as of `refine_queue`."""
    ((_, refined),) = refine_queue(predict, condition, sampler, ids=ids, batch_size=len(ids), **settings)
    return refined


def refine_queue(
    predict: Predict,
    condition: Condition,
    sampler: Sampler,
    *,
    batch_size: int,
    callback: Callable[[Step], None] | None = None,
    **settings: Any,
) -> Iterator[tuple[Tensor, Refined]]:
    """Refines random tokens into samples, as `finished` yields them; `settings` as of `Refinement`."""
    return finished(Refinement(predict, condition, sampler, batch_size=batch_size, **settings), batch_size, callback)
