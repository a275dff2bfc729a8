"""A text refiner and the text encoder that is trained along with it, as one network: to optimize, average and shard."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grn.networks.layers import Initialized
from grn.networks.text_encoder import ByteT5, TextEncoder
from grn.networks.text_refiner import TextCache, TextRefiner
from grn.runtime.errors import UserError


class CaptionedRefiner(Initialized):
    """A text refiner and the text encoder trained with it, as one network.

    Args:
        refiner: its `text_width` is the width of the encoder's features.
        encoder: trained along; None: the features come from a frozen one, which stands elsewhere.

    Raises:
        UserError: the refiner takes other features, or fewer text tokens, than the encoder gives.
    """

    scores_targets = True  # `forward` takes `targets` and `loss_chunk`

    def __init__(self, refiner: TextRefiner, encoder: ByteT5 | None = None):
        super().__init__()
        self.refiner = refiner
        self.encoder = encoder
        if encoder is not None:
            check_features(refiner, encoder)
        self.channels, self.classes = refiner.channels, refiner.classes

    @property
    def blocks(self) -> nn.ModuleList:
        """What a strategy shards one by one, and activation checkpointing computes again."""
        return self.refiner.blocks

    @property
    def head(self) -> nn.Module:
        """What a strategy shards apart, so that it stays float32."""
        return self.refiner.head

    def forward(
        self, tokens: Sequence[Tensor], t: Tensor, text: Sequence[str] | tuple[Tensor, Sequence[int]], **options: Any
    ) -> list[Tensor]:
        """Logits of packed samples, or their scores, as `TextRefiner.forward` gives them.

        Args:
            text: S captions; without an encoder of its own, (their features, their lengths).
            options: of `TextRefiner.forward`.
        """
        features, lengths = text if self.encoder is None else self.encoder(text)
        return self.refiner(tokens, t, features, lengths, **options)

    def predict(self, *arguments: Any, **options: Any) -> Tensor:
        """As `TextRefiner.predict`."""
        return self.refiner.predict(*arguments, **options)

    def text_cache(self, *arguments: Any, **options: Any) -> TextCache:
        """As `TextRefiner.text_cache`."""
        return self.refiner.text_cache(*arguments, **options)

    def initializers(self, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Callable]]:
        yield from self.refiner.initializers(generator)
        if self.encoder is not None:
            yield from self.encoder.initializers(generator)


def check_features(refiner: TextRefiner, encoder: TextEncoder) -> None:
    """Raises:
    UserError: the refiner takes other features, or fewer text tokens, than the encoder gives.
    """
    if refiner.text_width != encoder.width:
        raise UserError(
            f"model.text_width={refiner.text_width} does not fit the text encoder, whose features are "
            f"{encoder.width} wide"
        )
    if encoder.max_length > refiner.max_text:
        raise UserError(
            f"text_encoder.max_length={encoder.max_length} is more than model.max_text={refiner.max_text}: lower it"
        )
