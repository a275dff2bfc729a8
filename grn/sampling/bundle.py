"""A refiner with what it takes to draw samples: tokenizer, sampler, what conditions it; no training, no Lightning."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from grn.media.pixels import from_uint8, to_uint8
from grn.method import hbq
from grn.method.sampler import Condition, Sampler, Step
from grn.networks.conditions import Labels
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError, check_count
from grn.sampling.refinement import Refined, Refinement, Start, finished
from grn.sampling.request import AnyRequest, CompleteRequest

Bundle = TypeVar("Bundle", bound="RefinerBundle")


class RefinerBundle:
    """A class-conditional refiner that is ready to be sampled. It holds networks, which may be trained meanwhile.

    Args:
        network: (tokens int64 [B, D, T, H, W], t float [B], labels int64 [B]) -> logits [B, classes, D, T, H, W], with
            attributes `channels` (D), `classes`, `num_labels` (also the null label) and `size` (tokens a side).
        tokenizer: turns samples into pixels.
        sampler: how `generate` samples unless told otherwise.
        labeling: `ind` or `bit` (`grn.method.hbq`).
        precision: a context in which the network runs, such as autocast.

    Attributes:
        settings: those of its arguments that a run's config has under `training`.
        provenance: where the weights of its parts are from, for exports of it.

    Raises:
        UserError: a network that does not fit the tokenizer's tokens.
    """

    settings: tuple[str, ...] = ("labeling",)

    def __init__(
        self,
        network: Any,
        tokenizer: HBQTokenizer,
        sampler: Sampler,
        *,
        labeling: hbq.Labeling = "ind",
        precision: Callable[[], AbstractContextManager] = nullcontext,
    ):
        if labeling not in (known := get_args(hbq.Labeling)):
            raise UserError(f"training.labeling={labeling} must be {' or '.join(known)}")
        channels, classes = hbq.num_tokens(tokenizer.latent_channels, tokenizer.rounds, labeling)
        if (network.channels, network.classes) != (channels, classes):
            raise UserError(
                f"model.channels={network.channels} model.classes={network.classes} do not fit the tokenizer: "
                f"training.labeling={labeling} of {tokenizer.latent_channels} channels and {tokenizer.rounds} rounds "
                f"needs model.channels={channels} model.classes={classes}"
            )
        self.network, self.tokenizer, self.sampler, self.precision = network, tokenizer, sampler, precision
        self.labeling: hbq.Labeling = labeling
        self.provenance: dict[str, dict[str, Any]] = {}

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks, by name."""
        return {"network": self.network, "tokenizer": self.tokenizer}

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self: Bundle, *args: Any, **kwargs: Any) -> Bundle:
        """Moves and casts all networks, as `nn.Module.to`."""
        for part in self.parts.values():
            part.to(*args, **kwargs)
        return self

    def eval(self: Bundle) -> Bundle:
        for part in self.parts.values():
            part.eval()
        return self

    @property
    def num_conditions(self) -> int:
        """Among how many conditions samples are asked for, by number."""
        return self.network.num_labels

    @property
    def token_shape(self) -> tuple[int, int, int, int]:
        """(D, T, H, W) of one sample."""
        return self.network.channels, 1, self.network.size, self.network.size

    def complete(self, request: AnyRequest) -> CompleteRequest:
        """The request with all that it leaves open filled in, as this refiner was trained to be sampled.

        Raises:
            UserError: something that this refiner does not draw.
        """
        side = self.network.size * self.tokenizer.stride
        own = {"prompts": None, "negative_prompt": "", "height": side, "width": side, "frames": 1}
        for odd, value in own.items():
            given = getattr(request, odd)
            if given is None or (type(given), given) == (type(value), value):
                continue
            raise UserError(f"{odd} is for text refiners, this one is of classes: give labels=[0,1,...] instead")
        labels = tuple(range(self.num_conditions)) if request.labels is None else request.labels
        if not labels or any(type(label) is not int or not 0 <= label < self.num_conditions for label in labels):
            raise UserError(f"labels={list(labels)}: labels of this checkpoint are 0..{self.num_conditions - 1}")
        return self._completed(replace(request, labels=labels), **own)

    def _completed(self, request: AnyRequest, **own: Any) -> CompleteRequest:
        """With `own` values, and those that all refiners have, where the request has none."""
        request = CompleteRequest.of(request, **{"num": len(request.wanted), "sampler": self.sampler, **own})
        num, shape = request.num, self.shape_of(request)
        check_count("num", num)
        if type(request.seed) is not int or not -(2**63) <= request.seed < 2**64:
            raise UserError(f"seed={request.seed}: a whole number of 64 bits")
        if request.start is not None:
            self._check_start(request.start, num, shape)
        steps = request.sampler.schedule.max_steps
        for erasure in request.erasures:
            there = f"erasures: of sample {erasure.sample} after {erasure.after} steps"
            if not (0 <= erasure.sample < num and 0 <= erasure.after < steps):
                raise UserError(f"{there}, of num={num} samples that take {steps} at most: give them as they were made")
            if erasure.positions.dtype != torch.bool or tuple(erasure.positions.shape) != shape[1:]:
                raise UserError(f"{there}: positions {list(erasure.positions.shape)}, but maps are {list(shape[1:])}")
        return request

    def _check_start(self, start: Start, num: int, shape: tuple[int, int, int, int]) -> None:
        tokens, redraw = start.tokens, start.redraw
        if tokens.dtype != torch.long or tuple(tokens.shape) not in ((1, *shape), (num, *shape)):
            raise UserError(
                f"start: tokens are int64 {[num, *shape]}, or one map for all, got {tokens.dtype} {list(tokens.shape)}"
            )
        if redraw is not None and (redraw.dtype != torch.bool or tuple(redraw.shape) != (len(tokens), 1, *shape[1:])):
            raise UserError(f"start: redraw is bool {[len(tokens), 1, *shape[1:]]}, got {list(redraw.shape)}")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.network.classes:
            raise UserError(f"start: tokens are 0 to {self.network.classes - 1}: these are of another tokenizer")

    def shape_of(self, request: CompleteRequest) -> tuple[int, int, int, int]:
        """(D, T, H, W) of one sample of a request, in tokens."""
        return self.token_shape

    def generate(self, request: AnyRequest, callback: Callable[[Step], None] | None = None) -> Refined:
        """All samples of a request, in one batch and in their order."""
        complete = self.complete(request)
        ((_, refined),) = self.generate_queue(complete, batch_size=complete.num, callback=callback)
        return refined

    def generate_queue(
        self,
        request: AnyRequest,
        *,
        ids: Tensor | None = None,
        batch_size: int,
        callback: Callable[[Step], None] | None = None,
    ) -> Iterator[tuple[Tensor, Refined]]:
        """The samples of a request in the order in which they are done; see `grn.sampling.refinement.finished`.

        Args:
            ids: int64 [N] on the CPU, which samples of the request; None: all.

        Yields:
            (places in `ids`, ascending; Refined of these samples).
        """
        refinement = self.refinement(request, ids=ids, batch_size=batch_size)
        return finished(refinement, batch_size, callback)

    def refinement(self, request: AnyRequest, *, ids: Tensor | None = None, batch_size: int) -> Refinement:
        """The samples of a request being refined, to be taken step by step; arguments as of `generate_queue`.

        Of a compiled network the rows of a call are bucketed, and what else a step does is compiled, too.
        """
        complete = self.complete(request)
        ids = torch.arange(complete.num) if ids is None else ids
        start = complete.start
        if start is not None:
            start = start.to(self.device)
            start = start.expand(len(ids)) if len(start.tokens) == 1 else start.select(ids)
        place = {number: place for place, number in enumerate(ids.tolist())} if complete.erasures else {}

        def predict(tokens: Tensor, t: Tensor, condition: Condition) -> Tensor:
            with self.precision():
                return self.predict(tokens, t, condition)

        # nn.Module.compile() leaves no public trace.
        compiled = any(module._compiled_call_impl is not None for module in self.network.modules())
        with self.precision(), torch.no_grad():
            condition = self.condition(complete, ids)
        return Refinement(
            predict,
            condition,
            complete.sampler,
            shape=self.shape_of(complete),
            classes=self.network.classes,
            seed=complete.seed,
            ids=ids.to(self.device),
            batch_size=batch_size,
            start=start,
            erasures=[replace(it, sample=place[it.sample]) for it in complete.erasures if it.sample in place],
            bucketed=compiled,
            compiled=compiled,
        )

    def condition(self, request: CompleteRequest, ids: Tensor) -> Condition:
        """What samples `ids`, int64 [B] on the CPU, of a request are conditioned on."""
        labels = torch.tensor(request.wanted)[ids % len(request.wanted)]
        return Labels(labels.to(self.device), self.network.num_labels)

    def predict(self, tokens: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Logits of tokens at t under what `condition` made; as `grn.sampling.refinement.Refinement` asks for it."""
        return self.network(tokens, t, condition.index)

    @torch.no_grad()
    def tokenize(self, pixels: Tensor) -> Tensor:
        """uint8 pixels [B, 3, T, H, W] -> int64 tokens [B, D, T', h, w], in the tokenizer's own precision: under
        autocast some would fall to the other side of a bin's edge."""
        with torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.tokenize(from_uint8(pixels), self.labeling)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """int64 tokens [B, D, T', h, w] -> uint8 pixels [B, 3, T, H, W]."""
        return to_uint8(self.tokenizer.detokenize(tokens, self.labeling))

    def decode_stream(self, tokens: Tensor) -> Iterator[Tensor]:
        """The frames of `decode` one by one, uint8 [B, 3, H, W], in memory that does not grow with the clip."""
        latents = hbq.dequantize(tokens, self.tokenizer.rounds, self.labeling).unbind(2)
        return map(to_uint8, self.tokenizer.decode_stream(latents))
