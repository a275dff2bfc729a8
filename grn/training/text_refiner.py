"""LightningModule of text refiners, trained on packs of captioned images and clips of many sizes."""

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from grn.data.samples import by_shape
from grn.data.text_images import PackedTokens
from grn.method import corruption, philox
from grn.method.philox import Stream
from grn.networks.text_encoder import TextEncoder
from grn.networks.text_refiner import TextRefiner
from grn.runtime.errors import check_number
from grn.runtime.flops import forward_flop, hollow, training_flop
from grn.runtime.ranks import rank_and_world_size
from grn.sampling.text_bundle import TextRefinerBundle
from grn.training.fsdp import local
from grn.training.refiner import VALIDATION_SEED, RefinerModule

log = logging.getLogger(__name__)

MAX_PACK = 2**16  # samples: what positions in a global batch leave room for
FLOP_TEXT_UNIT = 16  # text lengths are rounded up to it where FLOP are counted


class TextRefinerModule(RefinerModule):
    """A text-conditional refiner, over the tokens of a frozen tokenizer and the features of a text encoder.

    Batches are packs (`grn.data.text_images`), where captions were dropped already, of pixels or of packed tokens, and
    with or without features that the frozen encoder would compute (`grn.data.text_tokens`). The loss of a step is
    the quotient of `corruption.weighted_sums` over all its samples, on any rank and in any accumulated batch; that of
    validation is the mean over samples.

    Args:
        bundle: as `RefinerModule` has it, of the refiner and its encoder, which is trained along or frozen.
        context_ratio: share of clips that are given first latents, true and without loss: each number of them, up to
            the bundle's `context_latents`, is as likely.
        sample_weight_power: p of the weights N^p of samples in the loss, where N positions are predicted; 0: samples
            count alike, 1: positions do.
        training: as `RefinerModule` has it.

    Raises:
        UserError: as of `RefinerModule`.
    """

    bundle: TextRefinerBundle

    def __init__(
        self,
        bundle: TextRefinerBundle,
        *,
        context_ratio: float = 0.2,
        sample_weight_power: float = 0.0,
        **training: Any,
    ):
        super().__init__(bundle, label_dropout=0.0, **training)
        check_number("training.context_ratio", context_ratio, least=0, most=1)
        check_number("training.sample_weight_power", sample_weight_power, least=0)
        self._is_batch_checked = True  # packs are from this package's data modules
        self.frozen_encoder = bundle.frozen_encoder
        self.context_ratio, self.sample_weight_power = context_ratio, sample_weight_power
        # Of the step until now, over ranks: [2] as `corruption.weighted_sums`, and what losses of its batches are
        # divided by.
        self._weighted: tuple[Tensor, Tensor] | None = None
        self._hollow: list[TextRefiner] = []  # a list, as it is no part of this module
        self._empty: Tensor | None = None

    @property
    def refiner(self) -> TextRefiner:
        return self.bundle.refiner

    @property
    def text_encoder(self) -> TextEncoder:
        return self.bundle.text_encoder

    @property
    def packed_tokens(self) -> PackedTokens:
        """For the data to pack by, in processes that get no copy of the encoder."""
        count = self.text_encoder.tokenization
        return PackedTokens(self.tokenizer.stride, self.tokenizer.temporal_stride, count)

    def setup(self, stage: str) -> None:
        self._hollow = [hollow(self.refiner)]  # before a strategy shards the network
        self.bundle.tells_cut = False  # once, here
        taken, prompts = self.text_encoder.tokenization, self.bundle.prompts
        if (cut := sum(map(taken.is_cut, map(self.bundle.worded, prompts)))) and rank_and_world_size()[0] == 0:
            log.warning(
                "%d of %d training.prompts have more tokens than text_encoder.max_length=%d: the rest is not drawn",
                cut,
                len(prompts),
                taken.max_length,
            )

    def configure_model(self) -> None:
        super().configure_model()
        # Else blocks would run outside of their root, which leaves ranks that sample more than others out of step.
        for method in ("predict", "text_cache"):
            register_fsdp_forward_method(self.network, method)

    def flop_per_sample(self, batch: dict[str, Any]) -> int:
        """As of `RefinerModule`, a mean over the batch's samples; without the text encoder's."""
        kind, count, packed = _kind(batch), len(batch["key"]), self.packed_tokens
        shapes = [packed.shape({kind: sample}) for sample in batch[kind]]
        text = batch["tokens"] - count - sum(map(math.prod, shapes))
        length = min(self.refiner.max_text, FLOP_TEXT_UNIT * math.ceil(text / count / FLOP_TEXT_UNIT))
        encoding = sum(self._tokenizer_flop(tuple(pixels.shape)) for pixels in batch.get("pixels", ()))
        return (encoding + sum(self._flop(shape, length) for shape in shapes)) // count

    @functools.lru_cache(maxsize=1024)  # noqa: B019, one module a run
    def _flop(self, shape: tuple[int, int, int], text: int) -> int:
        (network,) = self._hollow
        tokens = torch.zeros(network.channels, *shape, dtype=torch.long, device="meta")
        t, features = torch.zeros(1, device="meta"), torch.zeros(text, network.text_width, device="meta")
        return training_flop(network, lambda network: network([tokens], t, features, [text])[0])

    @functools.lru_cache(maxsize=1024)  # noqa: B019, one module a run
    def _tokenizer_flop(self, shape: tuple[int, ...]) -> int:
        pixels = torch.empty(1, *shape, device="meta")
        return forward_flop(self.tokenizer, lambda tokenizer: tokenizer.encode(pixels))

    # --- the task ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def tokenize(self, batch: dict[str, Any]) -> list[Tensor]:
        """A batch's `pixels`, S times uint8 [3, T, H, W], or packed `bits` -> S times int64 tokens [D, T', h, w].

        Size by size.
        """
        kind, tokens = _kind(batch), {}
        for rows in by_shape(batch[kind]):
            same = super().tokenize({kind: torch.stack([batch[kind][row] for row in rows])})
            tokens |= zip(rows, same)
        return [tokens[row] for row in range(len(tokens))]

    def predict_corrupted(
        self,
        tokens: list[Tensor],
        captions: list[str],
        *,
        seed: int,
        ids: Tensor,
        step: int,
        context: list[int],
        features: list[Tensor | None] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        """As of `RefinerModule`, for samples of any sizes and their captions.

        Args:
            context: how many latents at the start of each sample are given, true; there are no logits of them.
            features: [tokens, text width] of each caption, None for an empty one; None: the encoder computes them.
        """
        t = self.draw_signal_ratio(seed, ids, step)
        noisy, told = list(tokens), t.clone()
        for rows in by_shape(tokens):
            same = torch.stack([tokens[row] for row in rows])
            where = torch.tensor(rows).to(ids.device, non_blocking=True)
            # Given latents count into the realized share, although they are shown as they are: the authors' way.
            same, told[where] = self.corrupt(same, t[where], seed=seed, ids=ids[where], step=step)
            for row, sample in zip(rows, same):
                noisy[row] = torch.cat([tokens[row][:, : context[row]], sample[:, context[row] :]], dim=1)
        return told, self.network(noisy, told, self._text(captions, features), context_frames=context, **options)

    def _text(
        self, captions: list[str], features: list[Tensor | None] | None
    ) -> list[str] | tuple[Tensor, Sequence[int]]:
        """As `CaptionedRefiner` takes it."""
        if self.frozen_encoder is None:
            return captions
        if features is None:
            return self.frozen_encoder(captions)
        found = [self._empty_caption() if known is None else known for known in features]
        return torch.cat(found), [len(known) for known in found]

    def _empty_caption(self) -> Tensor:
        """The features of dropped captions, which no shard has; computed once, in the encoder's own precision."""
        if self._empty is not None:
            return self._empty
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            features, _ = self.text_encoder([""])
        self._empty = features
        return features

    def draw_context(self, tokens: list[Tensor], ids: Tensor) -> list[int]:
        """How many first latents of each sample are given in this step; some are always left."""
        most = self.bundle.context_latents
        if most == 0 or self.context_ratio == 0:
            return [0] * len(tokens)
        drawn = philox.uniform(self.seed, Stream.CONTEXT, ids, self.global_step) / self.context_ratio
        return [
            0 if share >= 1 else min(1 + int(share * most), sample.shape[1] - 1)
            for share, sample in zip(drawn.tolist(), tokens)
        ]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        tokens, packs = self.tokenize(batch), batch["packs"]
        ids = self._pack_positions(batch_idx, packs)
        context = self.draw_context(tokens, ids)
        targets, chunked = [sample[:, given:] for sample, given in zip(tokens, context)], {}
        if self.loss_chunk is not None:
            chunked = {"targets": targets, "loss_chunk": self.loss_chunk}
        t, predicted = self.predict_corrupted(
            tokens,
            [self.bundle.retagged(caption) if given else caption for caption, given in zip(batch["caption"], context)],
            seed=self.seed,
            ids=ids,
            step=self.global_step,
            context=context,
            features=batch.get("features"),
            **chunked,
        )
        losses, accuracy = predicted if chunked else corruption.per_sample(predicted, targets)
        loss = self._part_of_step(losses, [target[0].numel() for target in targets], batch_idx)
        self.finite_loss.watch(loss)
        own = {"batch_size": len(packs), "sync_dist": True}
        self.log("train/packing", batch["tokens"] / batch["max_tokens"], **own)
        self._add_accuracy(accuracy.detach(), t)
        return loss

    def _part_of_step(self, losses: Tensor, positions: list[int], batch_idx: int) -> Tensor:
        """The loss of this rank's batch, a scalar whose mean over ranks has the gradient of the step.

        What all samples of accumulated batches weigh is known with the last: until then they are divided by the weight
        of the first batch, and `on_before_optimizer_step` mends the sum of their gradients.

        Args:
            losses: float32 [S], of this rank's samples.
            positions: predicted ones of each.
        """
        own = corruption.weighted_sums(losses, positions, self.sample_weight_power)
        sums = self.trainer.strategy.reduce(own.detach().clone(), reduce_op="sum")
        if batch_idx % self.trainer.accumulate_grad_batches == 0 or self._weighted is None:  # or resumed amid a step
            self._weighted = sums, sums[1]
        else:
            self._weighted = self._weighted[0] + sums, self._weighted[1]
        return own[0] * self.trainer.world_size / self._weighted[1]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self._weighted is not None  # after a training step
        (loss, weight), unit = self._weighted
        if (batches := self.trainer.accumulate_grad_batches) > 1:
            gradients = [local(p.grad) for p in self.network.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, batches * unit / weight)
        self.log("train/loss", loss / weight, prog_bar=True)
        super().on_before_optimizer_step(optimizer)

    def _pack_positions(self, batch_idx: int, packs: list[int]) -> Tensor:
        """int64 [S]: a number for each sample of this rank that no other of the step's global batch has, by the
        position of its pack and its place in it."""
        positions = self._positions(batch_idx, len(packs)).repeat_interleave(
            torch.tensor(packs).to(self.device, non_blocking=True), output_size=sum(packs)
        )
        places = torch.cat([torch.arange(count, device=self.device) for count in packs])
        return positions * MAX_PACK + places

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        tokens = self.tokenize(batch)
        ids = self._validation_ids(batch, batch_idx)
        _, logits = self.predict_corrupted(
            tokens,
            batch["caption"],
            seed=VALIDATION_SEED,
            ids=ids,
            step=0,
            context=[0] * len(tokens),
            features=batch.get("features"),
        )
        losses, accuracy = corruption.per_sample(logits, tokens)
        self._add_validated(len(tokens), losses.mean(), accuracy.mean())


def _kind(batch: dict[str, Any]) -> str:
    """What a batch's tokens are made of."""
    return "bits" if "bits" in batch else "pixels"
