"""Training a text refiner on packs of captioned images and clips of many sizes (DESIGN 1.3, 1.5)."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from grn import philox, refinement
from grn.conditions import Text, text_condition
from grn.data.samples import by_shape
from grn.data.text_images import PackedTokens
from grn.errors import UserError
from grn.flops import forward_flop, hollow, training_flop
from grn.networks.captioned_refiner import CaptionedRefiner, check_features
from grn.networks.text_encoder import TextEncoder, tokenize
from grn.networks.text_refiner import MAX_FRAMES, TextRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.philox import Stream
from grn.sampler import Refined, Sampler, Start, Step
from grn.training.refiner import VALIDATION_SEED, RefinerModule

MAX_PACK = 2**16  # samples: what positions in a global batch leave room for
QUEUED_BATCHES = 8  # whose texts are encoded at a time
FLOP_TEXT_UNIT = 16  # text lengths are rounded up to it where FLOP are counted


class TextRefinerModule(RefinerModule):
    """A text-conditional refiner, over the tokens of a frozen tokenizer and the features of a text encoder.

    Batches are packs (`grn.data.text_images`), where captions were dropped already, of pixels or of packed tokens, and
    with or without features that the frozen encoder would compute (`grn.data.text_tokens`). The loss of a pack is the
    mean over its tokens, and that of a step the mean over packs: whole packs count alike, on whatever rank they are.

    What to sample is asked for by number, as of the classes of `RefinerModule`: of `prompts`, which may be replaced at
    any time, as may `negative_prompt`, `size` and `frames`.

    Args:
        network: the refiner, and its encoder where that is trained along.
        tokenizer, sampler: as `RefinerModule` has them.
        text_encoder: frozen; None where the network has its own.
        prompts: what pictures and scores of the run ask for.
        negative_prompt: what guidance leads away from; empty: the caption that training drops to.
        size: (height, width) in pixels of samples.
        frames: of samples; 1 for images.
        context_latents: as many first latents as may be given to a clip in training, true and without loss, so that
            samples can go on from an image or a clip (first-frame condition, DESIGN 1.5); 0: none ever are.
        context_ratio: share of clips that are given some: each number of them is as likely.
        training: as `RefinerModule` has it.

    Raises:
        UserError: parts that do not fit together, no prompts, samples that the networks do not make, or values of
            other kinds than these.
    """

    def __init__(
        self,
        network: CaptionedRefiner,
        tokenizer: HBQTokenizer,
        sampler: Sampler,
        *,
        text_encoder: TextEncoder | None = None,
        prompts: Sequence[str],
        negative_prompt: str = "",
        size: Sequence[int],
        frames: int = 1,
        context_latents: int = 0,
        context_ratio: float = 0.2,
        **training: Any,
    ):
        super().__init__(network, tokenizer, sampler, label_dropout=0.0, **training)
        if type(context_latents) is not int or context_latents < 0:
            raise UserError(f"training.context_latents={context_latents} must not be negative, and whole; 0 for none")
        if type(context_ratio) not in (int, float) or not 0 <= context_ratio <= 1:
            raise UserError(f"training.context_ratio={context_ratio} must lie in 0 to 1")
        if (text_encoder is None) == (network.encoder is None):
            raise UserError("text_encoder: a text refiner needs one, frozen or trained along, e.g. byt5_tiny")
        if text_encoder is not None:
            check_features(network.refiner, text_encoder)
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not all(type(it) is str for it in prompts):
            raise UserError(f"training.prompts={prompts}: a list of texts, training.prompts=['a seven','a one']")
        if not prompts:
            raise UserError("training.prompts is empty: what should pictures show?")
        if not isinstance(negative_prompt, str):
            raise UserError(f"training.negative_prompt={negative_prompt} must be a text; '' is the empty one")
        if not isinstance(size, Sequence) or [type(side) for side in size] != [int, int]:
            raise UserError(f"training.size={size}: height and width in pixels, training.size=[256,256]")
        if type(frames) is not int or frames < 1:
            raise UserError(f"training.frames={frames}: a whole number, 1 for images")
        self.frozen_encoder = text_encoder
        self.prompts, self.negative_prompt, self.size = list(prompts), negative_prompt, tuple(size)
        self.frames, self.context_latents, self.context_ratio = frames, context_latents, context_ratio
        self._hollow: list[TextRefiner] = []  # a list, as it is no part of this module
        self._empty: Tensor | None = None
        try:
            _ = self.token_shape
        except UserError as error:
            raise UserError(f"training.size={list(size)} with training.frames={frames}: {error}") from None

    def ask_for(
        self,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
    ) -> None:
        """Has samples be of these from now on; None leaves what was asked for before.

        Raises:
            UserError: no prompt, or a size or number of frames that is not whole or that the networks do not take.
        """
        for key, value in {"height": height, "width": width, "frames": frames}.items():
            if value is not None and type(value) is not int:
                raise UserError(f"{key}={value}: a whole number of {'frames' if key == 'frames' else 'pixels'}")
        if prompts is not None:
            if not prompts:
                raise UserError("prompts is empty: what should samples show?")
            self.prompts = list(prompts)
        if negative_prompt is not None:
            self.negative_prompt = negative_prompt
        self.size = tuple(own if asked is None else asked for asked, own in zip((height, width), self.size))
        if frames is not None:
            self.frames = frames
        _ = self.token_shape  # whether the size will do

    @property
    def refiner(self) -> TextRefiner:
        return self.network.refiner

    @property
    def text_encoder(self) -> TextEncoder:
        return self.network.encoder or self.frozen_encoder

    @property
    def num_labels(self) -> int:
        return len(self.prompts)

    @property
    def token_shape(self) -> tuple[int, int, int, int]:
        stride = self.tokenizer.stride
        if len(self.size) != 2 or min(self.size) < stride or any(side % stride for side in self.size):
            raise UserError(f"height and width must be multiples of the tokenizer's stride {stride}, got {self.size}")
        if (latents := 1 + (self.frames - 1) // self.tokenizer.temporal_stride) > MAX_FRAMES:
            raise UserError(f"frames={self.frames}: {latents} latents are more than a text refiner's {MAX_FRAMES}")
        self.tokenizer.check_video((1, 3, self.frames, *self.size))
        return self.network.channels, latents, self.size[0] // stride, self.size[1] // stride

    @property
    def packed_tokens(self) -> PackedTokens:
        """For the data to pack by, in processes that get no copy of the encoder."""
        encoder = self.text_encoder
        count = functools.partial(tokenize, tokenizer=encoder.tokenizer, max_length=encoder.max_length)
        return PackedTokens(self.tokenizer.stride, self.tokenizer.temporal_stride, count)

    @property
    def frozen(self) -> dict[str, nn.Module]:
        encoder = {} if self.frozen_encoder is None else {"frozen_encoder": self.frozen_encoder}
        return super().frozen | encoder

    def setup(self, stage: str) -> None:
        self._hollow = [hollow(self.refiner)]  # before a strategy shards the network

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
        kind = _kind(batch)
        tokens = [None] * len(batch[kind])
        for rows in by_shape(batch[kind]):
            same = super().tokenize({kind: torch.stack([batch[kind][row] for row in rows])})
            for row, sample in zip(rows, same):
                tokens[row] = sample
        return tokens

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
    ) -> tuple[Tensor, list[Tensor]]:
        """As of `RefinerModule`, for samples of any sizes and their captions.

        Args:
            context: how many latents at the start of each sample are given, true; there are no logits of them.
            features: [tokens, text width] of each caption, None for an empty one; None: the encoder computes them.
        """
        t = refinement.signal_ratio(seed, ids, step, mean=self.signal_ratio_mean, std=self.signal_ratio_std)
        noisy = [None] * len(tokens)
        for rows in by_shape(tokens):
            same, where = torch.stack([tokens[row] for row in rows]), torch.tensor(rows, device=ids.device)
            same = refinement.corrupt(same, t[where], self.network.classes, seed=seed, ids=ids[where], step=step)
            for row, sample in zip(rows, same):
                noisy[row] = torch.cat([tokens[row][:, : context[row]], sample[:, context[row] :]], dim=1)
        return t, self.network(noisy, t, self._text(captions, features), context_frames=context)

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
        if self._empty is None:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._empty, _ = self.frozen_encoder([""])
        return self._empty

    def draw_context(self, tokens: list[Tensor], ids: Tensor) -> list[int]:
        """How many first latents of each sample are given in this step; some are always left."""
        if self.context_latents == 0 or self.context_ratio == 0:
            return [0] * len(tokens)
        drawn = philox.uniform(self.seed, Stream.CONTEXT, ids, self.global_step) / self.context_ratio
        return [
            0 if share >= 1 else min(1 + int(share * self.context_latents), sample.shape[1] - 1)
            for share, sample in zip(drawn.tolist(), tokens)
        ]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        tokens, packs = self.tokenize(batch), batch["packs"]
        ids = self._pack_positions(batch_idx, packs)
        context = self.draw_context(tokens, ids)
        t, logits = self.predict_corrupted(
            tokens,
            batch["caption"],
            seed=self.seed,
            ids=ids,
            step=self.global_step,
            context=context,
            features=batch.get("features"),
        )
        targets = [sample[:, given:] for sample, given in zip(tokens, context)]
        losses, accuracy = refinement.per_sample(logits, targets)
        sizes = torch.tensor([float(target.numel()) for target in targets], device=losses.device)
        of_packs = zip((losses * sizes).split(packs), sizes.split(packs))
        loss = torch.stack([total.sum() / count.sum() for total, count in of_packs]).mean()
        self.finite_loss.watch(loss)
        own = {"batch_size": len(packs), "sync_dist": True}
        self.log("train/loss", loss, prog_bar=True, **own)
        self.log("train/packing", batch["tokens"] / batch["max_tokens"], **own)
        self._log_accuracy(accuracy.detach(), t)
        return loss

    def _pack_positions(self, batch_idx: int, packs: list[int]) -> Tensor:
        """int64 [S]: a number for each sample of this rank that no other of the step's global batch has, by the
        position of its pack and its place in it."""
        positions = self._positions(batch_idx, len(packs)).repeat_interleave(
            torch.tensor(packs, device=self.device), output_size=sum(packs)
        )
        places = torch.cat([torch.arange(count, device=self.device) for count in packs])
        return positions * MAX_PACK + places

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        tokens = self.tokenize(batch)
        ids = self._validation_ids(batch)
        _, logits = self.predict_corrupted(
            tokens,
            batch["caption"],
            seed=VALIDATION_SEED,
            ids=ids,
            step=0,
            context=[0] * len(tokens),
            features=batch.get("features"),
        )
        losses, accuracy = refinement.per_sample(logits, tokens)
        on_epoch = {"batch_size": float(len(tokens)), "sync_dist": True}
        self.log("val/loss", losses.mean(), prog_bar=True, **on_epoch)
        self.log("val/accuracy", accuracy.mean(), **on_epoch)

    # --- sampling ---------------------------------------------------------------------------------------------------

    def generate_queue(
        self,
        labels: Tensor,
        *,
        ids: Tensor,
        batch_size: int,
        start: Start | None = None,
        callback: Callable[[Step], None] | None = None,
        **others: Any,
    ) -> Iterator[tuple[Tensor, Refined]]:
        """As of `RefinerModule`; of many prompts, a few batches' at a time: their keys and values fill the memory."""
        for rows in torch.arange(len(labels)).split(QUEUED_BATCHES * batch_size):
            finished = super().generate_queue(
                labels[rows],
                ids=ids[rows],
                batch_size=batch_size,
                start=None if start is None else start.select(rows),
                callback=None if callback is None else functools.partial(_renumbered, callback, rows),
                **others,
            )
            for places, refined in finished:
                yield rows[places], refined

    def condition(self, labels: Tensor) -> Text:
        """What samples of the prompts of these numbers, int64 [B], are conditioned on."""
        prompts = [self.prompts[label] for label in labels.tolist()]
        return text_condition(self.network, self.text_encoder, prompts, self.negative_prompt)

    def predict(self, tokens: Tensor, t: Tensor, condition: Text) -> Tensor:
        return self.network.predict(tokens, t, condition.cache, condition.index)


def _renumbered(callback: Callable[[Step], None], rows: Tensor, step: Step) -> None:
    callback(replace(step, rows=rows[step.rows]))


def _kind(batch: dict[str, Any]) -> str:
    """What a batch's tokens are made of."""
    return "bits" if "bits" in batch else "pixels"
