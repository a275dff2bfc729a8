"""A text refiner with what it takes to draw samples."""

import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from grn.checkpoints.trust import TEXT_SETTINGS
from grn.method import hbq
from grn.method.sampler import Sampler, Step
from grn.networks.captioned_refiner import CaptionedRefiner, check_features
from grn.networks.conditions import Text, text_condition
from grn.networks.text_encoder import TextEncoder
from grn.networks.text_refiner import MAX_FRAMES, TextRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError, check_count
from grn.runtime.ranks import rank_and_world_size
from grn.sampling.bundle import RefinerBundle
from grn.sampling.refinement import Refined, given_latents
from grn.sampling.request import AnyRequest, CompleteRequest

log = logging.getLogger(__name__)

SHOWN = 500  # characters of a prompt in a message
QUEUED_BATCHES = 8  # whose texts are encoded at a time


class TextRefinerBundle(RefinerBundle):
    """A text refiner that is ready to be sampled.

    `prompts`, `negative_prompt`, `size` and `frames` are what is drawn where a request leaves them open.

    Args:
        network: the refiner, and its encoder where that is trained along.
        tokenizer, sampler, labeling, precision: as `RefinerBundle` has them.
        text_encoder: frozen; None where the network has its own.
        prompts: what pictures and scores of the run ask for.
        negative_prompt: what guidance leads away from; empty: the caption that training drops to.
        prompt_prefix, prompt_suffix: what every prompt stands between as it is drawn, as captions of the data did, e.g.
            a task's tag; the empty prompt, which captions are dropped to, and the negative one stay as they are.
        context_prefix: of clips that are given latents, in place of `prompt_prefix`, of captions of the data and of
            prompts alike; None: the same.
        size: (height, width) in pixels of samples.
        frames: of samples; 1 for images.
        context_latents: how many first latents of a clip may be given, so that samples continue from an image or a
            clip (docs/method.md#image-to-video); 0: none.

    Attributes:
        tells_cut: whether prompts that are longer than the encoder takes are told as they are drawn.

    Raises:
        UserError: parts that do not fit together, no prompts, samples that the networks do not make, or values of
            other kinds than these.
    """

    settings = (*RefinerBundle.settings, *TEXT_SETTINGS)

    def __init__(
        self,
        network: CaptionedRefiner,
        tokenizer: HBQTokenizer,
        sampler: Sampler,
        *,
        labeling: hbq.Labeling = "ind",
        precision: Callable[[], AbstractContextManager] = nullcontext,
        text_encoder: TextEncoder | None = None,
        prompts: Sequence[str],
        negative_prompt: str = "",
        prompt_prefix: str = "",
        prompt_suffix: str = "",
        context_prefix: str | None = None,
        size: Sequence[int],
        frames: int = 1,
        context_latents: int = 0,
    ):
        super().__init__(network, tokenizer, sampler, labeling=labeling, precision=precision)
        check_count("training.context_latents", context_latents, least=0)
        check_count("training.frames", frames)
        if (text_encoder is None) == (network.encoder is None):
            raise UserError("text_encoder: a text refiner needs one, frozen or trained along, e.g. byt5_tiny")
        if text_encoder is not None:
            check_features(network.refiner, text_encoder)
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not all(type(it) is str for it in prompts):
            raise UserError(f"training.prompts={prompts}: a list of texts, training.prompts=['a seven','a one']")
        if not prompts:
            raise UserError("training.prompts is empty: give at least one prompt")
        if not isinstance(negative_prompt, str):
            raise UserError(f"training.negative_prompt={negative_prompt} must be a text; '' is the empty one")
        for name, text in (("prompt_prefix", prompt_prefix), ("prompt_suffix", prompt_suffix)):
            if not isinstance(text, str):
                raise UserError(f"training.{name}={text} must be a text; '' is none")
        if not isinstance(context_prefix, str | None):
            raise UserError(f"training.context_prefix={context_prefix} must be a text; null: training.prompt_prefix")
        if not isinstance(size, Sequence) or [type(side) for side in size] != [int, int]:
            raise UserError(f"training.size={size}: height and width in pixels, training.size=[256,256]")
        self.frozen_encoder = text_encoder
        self.prompts, self.negative_prompt = list(prompts), negative_prompt
        height, width = size
        self.size = (height, width)
        self.prompt_prefix, self.prompt_suffix, self.context_prefix = prompt_prefix, prompt_suffix, context_prefix
        self.frames, self.context_latents = frames, context_latents
        self.tells_cut, self._offloaded = True, False
        try:
            _ = self.token_shape
        except UserError as error:
            raise UserError(f"training.size={list(size)} with training.frames={frames}: {error}") from None

    @property
    def parts(self) -> dict[str, nn.Module]:
        encoder = {} if self.frozen_encoder is None else {"frozen_encoder": self.frozen_encoder}
        return super().parts | encoder

    def complete(self, request: AnyRequest) -> CompleteRequest:
        """As of `RefinerBundle`.

        Raises:
            UserError: no prompt, or a size or number of frames that is not whole or that the networks do not take.
        """
        if request.labels is not None:
            raise UserError(f"labels={list(request.labels)}: this refiner takes texts, prompts=[...]")
        for key in ("height", "width", "frames"):
            value = getattr(request, key)
            if value is not None and type(value) is not int:
                raise UserError(f"{key}={value}: a whole number of {'frames' if key == 'frames' else 'pixels'}")
        prompts = tuple(self.prompts) if request.prompts is None else request.prompts
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"prompts={list(prompts)}: texts, at least one")
        if not isinstance(request.negative_prompt, str | None):
            raise UserError(f"negative_prompt={request.negative_prompt}: one text")
        height, width = self.size
        own = {"negative_prompt": self.negative_prompt, "height": height, "width": width, "frames": self.frames}
        return self._completed(replace(request, prompts=prompts), **own)

    def shape_of(self, request: CompleteRequest) -> tuple[int, int, int, int]:
        return self._shape((request.height, request.width), request.frames)

    @property
    def refiner(self) -> TextRefiner:
        return self.network.refiner

    @property
    def text_encoder(self) -> TextEncoder:
        encoder = self.network.encoder or self.frozen_encoder
        assert encoder is not None  # as __init__ has checked
        return encoder

    @property
    def num_conditions(self) -> int:
        return len(self.prompts)

    @property
    def token_shape(self) -> tuple[int, int, int, int]:
        return self._shape(self.size, self.frames)

    def _shape(self, size: tuple[int, int], frames: int) -> tuple[int, int, int, int]:
        stride = self.tokenizer.stride
        if min(size) < stride or any(side % stride for side in size):
            raise UserError(f"height and width must be multiples of the tokenizer's stride {stride}, got {size}")
        if (latents := 1 + (frames - 1) // self.tokenizer.temporal_stride) > MAX_FRAMES:
            raise UserError(f"frames={frames}: {latents} latents are more than a text refiner's {MAX_FRAMES}")
        self.tokenizer.check_video((1, 3, frames, *size))
        return self.network.channels, latents, size[0] // stride, size[1] // stride

    def generate_queue(
        self,
        request: AnyRequest,
        *,
        ids: Tensor | None = None,
        batch_size: int,
        callback: Callable[[Step], None] | None = None,
    ) -> Iterator[tuple[Tensor, Refined]]:
        """As of `RefinerBundle`; of many prompts, a few batches' at a time: their keys and values fill the memory."""
        complete = self.complete(request)
        ids = torch.arange(complete.num) if ids is None else ids
        for rows in torch.arange(len(ids)).split(QUEUED_BATCHES * batch_size):
            done = super().generate_queue(
                complete,
                ids=ids[rows],
                batch_size=batch_size,
                callback=None if callback is None else functools.partial(_renumbered, callback, rows),
            )
            for places, refined in done:
                yield rows[places], refined

    def worded(self, prompt: str) -> str:
        """A prompt as the text encoder gets it."""
        return f"{self.prompt_prefix}{prompt}{self.prompt_suffix}" if prompt else ""

    def retagged(self, text: str) -> str:
        """A worded prompt, or a caption, of a clip that is given latents."""
        if self.context_prefix is None or not text or not text.startswith(self.prompt_prefix):
            return text
        return self.context_prefix + text.removeprefix(self.prompt_prefix)

    def condition(self, request: CompleteRequest, ids: Tensor) -> Text:
        wanted = request.wanted
        prompts = [self.worded(str(wanted[number % len(wanted)])) for number in ids.tolist()]
        if self.shape_of(request)[1] > 1 and given_latents(request.start):
            prompts = [self.retagged(prompt) for prompt in prompts]
        encoder = self.text_encoder
        if self.tells_cut:
            for prompt in dict.fromkeys([*prompts, request.negative_prompt]):
                self._warn_if_cut(prompt)
        if self._offloaded:
            encoder.to(self.device)
        try:
            return text_condition(self.network, encoder, prompts, request.negative_prompt)
        finally:
            if self._offloaded:
                encoder.to("cpu")

    @functools.lru_cache(maxsize=2**16)  # noqa: B019, one bundle a process; a prompt is told once
    def _warn_if_cut(self, prompt: str) -> None:
        taken = self.text_encoder.tokenization
        if taken.is_cut(prompt) and rank_and_world_size()[0] == 0:
            log.warning(
                "a prompt has more tokens than text_encoder.max_length=%d: of %s only %s is drawn",
                taken.max_length,
                json.dumps(prompt[:SHOWN], ensure_ascii=False),
                json.dumps(taken.used(prompt)[:SHOWN], ensure_ascii=False),
            )

    def offload_encoder(self, device: torch.device) -> None:
        """Moves all but a frozen text encoder to `device`; that goes there only while it encodes prompts of samples."""
        encoder, self.frozen_encoder = self.frozen_encoder, None
        self.to(device)
        self.frozen_encoder, self._offloaded = encoder, encoder is not None

    def predict(self, tokens: Tensor, t: Tensor, condition: Text) -> Tensor:
        return self.network.predict(tokens, t, condition.cache, condition.index)


def _renumbered(callback: Callable[[Step], None], rows: Tensor, step: Step) -> None:
    callback(replace(step, rows=rows[step.rows]))
