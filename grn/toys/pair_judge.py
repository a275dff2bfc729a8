"""The judge of digit pairs: a classifier that reads both digits in their places."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grn.metrics.ranks import Totals
from grn.metrics.splits import Split
from grn.runtime.errors import UserError
from grn.toys.digit_pairs import HELDOUT_PAIRS, PAIRS, pair_caption
from grn.toys.digits import digit_caption
from grn.toys.judge import DigitsJudge


class DigitPairsJudge:
    """`DigitsJudge`, trained on the training images of single digits, reads the left and the right half of samples.

    `compute` gives, of the samples that a pair was asked for, the shares with both digits in their places:
    `pair_accuracy`, and apart `pair_accuracy_shown` and `pair_accuracy_heldout`, of the pairs that training shows and
    of those that it never does (`grn.toys.digit_pairs.HELDOUT_PAIRS`); `left_accuracy` and `right_accuracy` of one
    digit alone; and `judge_val_accuracy`: how well the judge reads real held-out digits.

    Args:
        prompts: what samples are asked for, by the numbers that `update` gets; those that ask for no pair are not
            judged.
        train, val: the splits of data=digits_t2i.
        device: where the counts are kept for the reduction over ranks; the SVC runs on the CPU.
        cache_dir: not used.

    Raises:
        UserError: no pair among the prompts, or a split without single digits.
    """

    def __init__(
        self,
        *,
        prompts: Sequence[str],
        train: Split,
        val: Split,
        device: torch.device | str = "cpu",
        cache_dir: str | Path | None = None,
    ):
        self.pairs = self._asked_for(prompts)
        self.judge = DigitsJudge(train=lambda: single_digits(train()), val=lambda: single_digits(val()))
        self.counts = Totals(4, len(prompts), dtype=torch.int64).to(device)  # asked for, left right, right right, both

    @classmethod
    def check(cls, num: int | None, *, prompts: Sequence[str]) -> None:
        """As `GenerationScores.check`."""
        cls._asked_for(prompts)

    @staticmethod
    def _asked_for(prompts: Sequence[str]) -> list[Any]:
        numbers = {pair_caption(*pair): pair for pair in PAIRS}
        found = [numbers.get(re.sub(r"\s+", " ", prompt.strip().lower())) for prompt in prompts]
        if not any(found):
            raise UserError('scores.judge.prompts asks for no pair of digits, such as "a three left of an eight"')
        return found

    def update(self, images: Tensor, labels: Tensor, ids: Tensor | None = None) -> None:
        """Adds generated images uint8 [B, 3, H, 2H] and the numbers of their prompts, int64 [B]; ids are not read."""
        if images.shape[-1] % 2:
            raise UserError(f"scores.judge: pairs of digits have two halves, images are {list(images.shape[2:])}")
        left, right = (self.judge.read(half) for half in images.chunk(2, dim=-1))
        added = torch.zeros(4, len(self.pairs), dtype=torch.int64)
        for label, *read in zip(labels.tolist(), left.tolist(), right.tolist()):
            if (pair := self.pairs[label]) is not None:
                found = [own == asked for own, asked in zip(read, pair)]
                added[:, label] += torch.tensor([True, *found, all(found)])
        self.counts.update(added)

    def compute(self) -> dict[str, float]:
        """The scores of all images given since the last `reset`, over all ranks; every rank must call it.

        Raises:
            UserError: no image of a pair was given.
        """
        counts = self.counts.compute()
        heldout = torch.tensor([pair in HELDOUT_PAIRS for pair in self.pairs], device=counts.device)
        asked, left, right, both = counts.sum(dim=1).tolist()
        if not asked:
            raise UserError("scores.judge: no images of pairs to judge: generate at least one")
        scores = {"pair_accuracy": both / asked, "left_accuracy": left / asked, "right_accuracy": right / asked}
        for name, chosen in {"shown": ~heldout, "heldout": heldout}.items():
            asked, *_, both = counts[:, chosen].sum(dim=1).tolist()
            if asked:
                scores[f"pair_accuracy_{name}"] = both / asked
        return scores | {"judge_val_accuracy": self.judge.val_accuracy}

    def reset(self) -> None:
        """Forgets the generated images."""
        self.counts.reset()


def single_digits(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Tensor]]:
    """Of batches of data=digits_t2i the digits alone, as `grn.metrics.splits` has labeled images."""
    labels = {digit_caption(label): label for label in range(10)}
    for batch in batches:
        found = [(pixels, labels[c]) for pixels, c in zip(batch["pixels"], batch.get("caption", [])) if c in labels]
        if found:
            pixels, own = zip(*found)
            yield {"pixels": torch.stack(pixels), "label": torch.tensor(own)}
