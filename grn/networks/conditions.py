"""Conditions in sampling: labels of class refiners, texts of text refiners."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grn.networks.captioned_refiner import CaptionedRefiner
from grn.networks.text_encoder import TextEncoder
from grn.networks.text_refiner import TextCache, TextRefiner


@dataclass(frozen=True)
class Labels:
    """A `grn.method.sampler.Condition` of class labels int64 [B]; `null_label` stands for no condition."""

    index: Tensor
    null_label: int

    def __len__(self) -> int:
        return len(self.index)

    def select(self, rows: Tensor) -> "Labels":
        return Labels(self.index[rows.to(self.index.device, non_blocking=True)], self.null_label)

    def null(self) -> "Labels":
        return Labels(torch.full_like(self.index, self.null_label), self.null_label)

    def join(self, other: "Labels") -> "Labels":
        return Labels(torch.cat([self.index, other.index]), self.null_label)


@dataclass(frozen=True)
class Text:
    """A `grn.method.sampler.Condition` of texts: the text of each row, and the one that stands for no condition.

    Rows are only numbers: taking, joining and replacing them copies no keys and values.

    Args:
        cache: of all texts, those that stand for no condition among them.
        index, null_index: int64 [B] each, on the CPU.
    """

    cache: TextCache
    index: Tensor
    null_index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def select(self, rows: Tensor) -> "Text":
        rows = rows.to(self.index.device)
        return Text(self.cache, self.index[rows], self.null_index[rows])

    def null(self) -> "Text":
        return Text(self.cache, self.null_index, self.null_index)

    def join(self, other: "Text") -> "Text":
        if other.cache is not self.cache:
            raise ValueError("texts to join must be of one cache")
        return Text(self.cache, torch.cat([self.index, other.index]), torch.cat([self.null_index, other.null_index]))


@torch.no_grad()
def text_condition(
    refiner: TextRefiner | CaptionedRefiner,
    encoder: TextEncoder,
    captions: Sequence[str],
    negative: str | Sequence[str] = "",
) -> Text:
    """Captions, each encoded once however often it is asked for, as a condition for the sampler.

    Args:
        captions: B.
        negative: what guidance leads away from, for all or B of them; empty: the caption that training drops to.
    """
    negatives = [negative] * len(captions) if isinstance(negative, str) else list(negative)
    if len(negatives) != len(captions):
        raise ValueError(f"{len(captions)} captions have {len(negatives)} negative ones")
    place = {text: number for number, text in enumerate(dict.fromkeys([*captions, *negatives]))}
    features, lengths = encoder(list(place))
    cache = refiner.text_cache(features.to(next(refiner.parameters()).device), lengths)
    index, null_index = (torch.tensor([place[text] for text in texts]) for texts in (captions, negatives))
    return Text(cache, index, null_index)
