"""A request: everything samples depend on besides the weights."""

from dataclasses import dataclass
from typing import Any

from grn.method.sampler import Sampler
from grn.sampling.refinement import Erasure, Start


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    labels: tuple[int, ...] | None = None
    prompts: tuple[str, ...] | None = None
    seed: int = 0
    start: Start | None = None
    erasures: tuple[Erasure, ...] = ()

    @property
    def wanted(self) -> tuple[int | str, ...]:
        """The labels or prompts that take turns."""
        return self.prompts if self.prompts is not None else self.labels or ()


@dataclass(frozen=True, kw_only=True)
class Request(_Wanted):
    """What to draw, and how; None leaves it to the refiner, as it was trained to be sampled (`grn.sampling.bundle`).

    Sample i is of label or prompt i modulo their number, and a function of the seed and i: the same whatever `num` is.

    Args:
        labels: of a refiner of classes; None: all of them.
        prompts, negative_prompt: of a refiner of texts; what guidance leads to, and away from.
        height, width: of a refiner of texts, in pixels.
        frames: of a refiner of texts; 1 for images.
        num: how many samples; None: one of each label or prompt.
        sampler: schedule, temperature and guidance.
        seed: of all draws, 64 bits.
        start: given tokens to start from: one map (B = 1) for all samples, or one for each.
        erasures: what was put back to noise meanwhile (`grn.sampling.refinement.Refinement.erase`).
    """

    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    num: int | None = None
    sampler: Sampler | None = None


@dataclass(frozen=True, kw_only=True)
class CompleteRequest(_Wanted):
    """A `Request` that leaves nothing open (`RefinerBundle.complete`); it has labels or prompts, never both."""

    negative_prompt: str
    height: int
    width: int
    frames: int
    num: int
    sampler: Sampler

    @classmethod
    def of(cls, request: "AnyRequest", **own: Any) -> "CompleteRequest":
        """The request, with `own` values where it has none."""
        return cls(**{**own, **{name: value for name, value in vars(request).items() if value is not None}})


AnyRequest = Request | CompleteRequest
