"""Refines whole batches, with arguments as of `Refinement`."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from grn.method.sampler import Condition, Sampler, Step
from grn.sampling.refinement import Erasure, Refined, Refinement, Start, finished


def refine(
    predict: Callable[[Tensor, Tensor, Condition], Tensor],
    condition: Condition,
    sampler: Sampler,
    *,
    shape: tuple[int, int, int, int],
    classes: int,
    seed: int,
    ids: Tensor,
    start: Start | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Refined:
    """Refines random tokens into one batch of samples; arguments as in `refine_queue`."""
    groups = refine_queue(
        predict,
        condition,
        sampler,
        shape=shape,
        classes=classes,
        seed=seed,
        ids=ids,
        batch_size=len(ids),
        start=start,
        callback=callback,
    )
    ((_, refined),) = groups
    return refined


def refine_queue(
    predict: Callable[[Tensor, Tensor, Condition], Tensor],
    condition: Condition,
    sampler: Sampler,
    *,
    shape: tuple[int, int, int, int],
    classes: int,
    seed: int,
    ids: Tensor,
    batch_size: int,
    start: Start | None = None,
    erasures: Sequence[Erasure] = (),
    bucketed: bool = False,
    compiled: bool = False,
    callback: Callable[[Step], None] | None = None,
) -> Iterator[tuple[Tensor, Refined]]:
    """Refines random tokens into samples; arguments as of `Refinement`.

    Args:
        callback: called after every step.

    Yields:
        (rows int64 [B], Refined of B samples): places in `ids`, ascending; each time the next `batch_size` that are
        done, at last what is left.
    """
    refinement = Refinement(
        predict,
        condition,
        sampler,
        shape=shape,
        classes=classes,
        seed=seed,
        ids=ids,
        batch_size=batch_size,
        start=start,
        erasures=erasures,
        bucketed=bucketed,
        compiled=compiled,
    )
    return finished(refinement, batch_size, callback)
