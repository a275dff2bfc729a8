"""Records a refinement for films and pages: a callback of the sampler."""

from dataclasses import dataclass

import torch
from torch import Tensor

from grn.method.sampler import Step

# What a step makes of a token: a prediction that was not there before, the prediction of before, noise where there was
# a prediction, noise where there was noise.
STATES = ("filled", "kept", "erased", "blank")


@dataclass(frozen=True)
class Moment:
    """One step of B samples, on the CPU; of samples that are done, their last one.

    taken int64 [B]: steps with this one. t float64 [B]: the signal ratio after it. entropy float32 [B], normalized to
    [0, 1]. seen, predicted uint8 [B, D, L, h, w]: the map that the network saw, and what it predicted (HBQ has 256
    classes at most). states uint8, likewise, as in `STATES`. uncertainty float32 [B, L, h, w]: the entropy of each
    position in nats, a mean over its tokens.
    """

    taken: Tensor
    t: Tensor
    entropy: Tensor
    seen: Tensor
    predicted: Tensor
    states: Tensor
    uncertainty: Tensor

    def share(self, state: str) -> float:
        """Of all tokens, how many are in this state."""
        return (self.states == STATES.index(state)).float().mean().item()


class Recording:
    """A sampler callback that keeps every step of the samples, of the latents that are shown.

    Args:
        given: of clips, how many first latents stay as they were given.
        whole: of clips, keep all latents; else the first one that is drawn, as those behind it have no part in its
            pixels.

    Attributes:
        moments: a `Moment` a step.
        prefix: uint8 [B, D, given, h, w], the given latents, which decoding needs; empty with `whole`.
    """

    def __init__(self, *, given: int = 0, whole: bool = False) -> None:
        self._shown = slice(None) if whole else slice(given, given + 1)
        self.prefix = torch.empty(0, dtype=torch.uint8)
        self.moments: list[Moment] = []
        self._held: Tensor | None = None  # bool, like `Moment.seen`: where each map holds a prediction

    def __call__(self, step: Step) -> None:
        tokens, predicted, kept, stayed = (
            x[:, :, self._shown].cpu() for x in (step.tokens, step.predicted, step.kept, step.stayed)
        )
        uncertainty = step.token_entropy[:, :, self._shown].mean(dim=1).float().cpu()
        before = torch.zeros_like(kept) if self._held is None else self._held[step.rows]
        kept = kept | (stayed & before)
        if not self.moments:
            self.prefix = step.tokens[:, :, : self._shown.start or 0].to(torch.uint8).cpu()
        now = {
            "taken": step.index + 1,
            "t": step.t_next,
            "entropy": step.entropy.cpu(),
            "seen": tokens.to(torch.uint8),
            "predicted": predicted.to(torch.uint8),
            "states": token_states(before, kept, stayed | (predicted == tokens)),
            "uncertainty": uncertainty,
        }
        if self.moments and self._held is not None:
            earlier = vars(self.moments[-1])
            now = {name: earlier[name].index_copy(0, step.rows, value) for name, value in now.items()}
            self._held = self._held.index_copy(0, step.rows, kept)
        else:
            self._held = kept
        self.moments.append(Moment(**now))

    def erase(self, sample: int, positions: Tensor) -> None:
        """What `Refinement.erase` was told, after the last moment: these tokens are noise again.

        Args:
            sample: its place among the samples.
            positions: bool [T, h, w] of all latents.
        """
        if self._held is not None:
            held = self._held.clone()
            held[sample] &= ~positions[self._shown].cpu()
            self._held = held

    def rewind(self, steps: int) -> None:
        """Forgets all moments but the first `steps`, so that the refinement resumes from there (`Refinement.fork`)."""
        del self.moments[steps:]
        self._held = self.moments[-1].states <= STATES.index("kept") if self.moments else None

    def with_prefix(self, tokens: Tensor) -> Tensor:
        """uint8 tokens of a moment -> int64 [B, D, T, h, w], with what stands before them, to decode; the frames of the
        latents that are shown come last."""
        return torch.cat([self.prefix, tokens], dim=2).long() if self.prefix.numel() else tokens.long()


def token_states(before: Tensor, now: Tensor, same: Tensor) -> Tensor:
    """The state of every token after a step, uint8 as in `STATES`, by three bools of its shape.

    Args:
        before, now: whether the map held a prediction, and whether it does now.
        same: whether what the map holds now is what it held.
    """
    filled, kept, erased, blank = range(len(STATES))
    taken = torch.where(before & same, kept, filled)
    return torch.where(now, taken, torch.where(before, erased, blank)).to(torch.uint8)
