"""Samples many images with an always full batch: for `grn.sample`, `grn.evaluate` and callbacks."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial

import torch
from torch import Tensor

from grn.method.sampler import Step
from grn.runtime.errors import UserError, check_count
from grn.sampling.bundle import RefinerBundle
from grn.sampling.refinement import Refined
from grn.sampling.request import AnyRequest, CompleteRequest

DECODED_PIXELS = 2**22  # that are decoded at once: those of 64 images of 256x256


@dataclass(frozen=True)
class Batch:
    """ids int64 [B], ascending; labels int64 [B], of texts the prompts' numbers; what the sampler said; tokens ->
    pixels, as the bundle's `decode`."""

    ids: Tensor
    labels: Tensor
    refined: Refined
    decode: Callable[[Tensor], Tensor]

    @cached_property
    def pixels(self) -> Tensor:
        """uint8 [B, 3, T, H, W] on the bundle's device."""
        return self.decode(self.refined.tokens)

    @cached_property
    def images(self) -> Tensor:
        """The first frames, uint8 [B, 3, H, W]: all there is of images; of clips no others are decoded."""
        tokens = self.refined.tokens
        return (self.pixels if tokens.shape[2] == 1 else self.decode(tokens[:, :, :1]))[:, :, 0]


def generate(
    bundle: RefinerBundle,
    request: AnyRequest,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    watch: Callable[[Step], None] | None = None,
    watch_first: Callable[[Step], None] | None = None,
) -> Iterator[Batch]:
    """The samples of a request, this rank its share, in the order in which they are done.

    Sample i depends on the request and i alone, not on `batch_size` or `world_size`.

    Args:
        batch_size: samples refined at a time; batches have fewer where these would be more than `DECODED_PIXELS`, and
            a clip that is more alone is decoded in a stream.
        watch: called after every step; `Step.rows` are places among this rank's samples.
        watch_first: called after every step of the first `batch_size` samples, of what is left of them.

    Raises:
        UserError: a `batch_size` that is none, or something that the refiner does not draw.
    """
    check_count("batch_size", batch_size)
    complete = bundle.complete(request)
    check_memory(bundle, complete, batch_size=batch_size)
    ids = torch.arange(complete.num)[rank::world_size]
    labels = torch.arange(complete.num) % len(complete.wanted)
    if complete.labels is not None:
        labels = torch.tensor(complete.labels)[labels]
    first = None if watch_first is None else partial(_watch, watch_first, batch_size)
    callbacks = [callback for callback in (watch, first) if callback is not None]
    _, latents, height, width = bundle.shape_of(complete)
    frames = 1 + (latents - 1) * bundle.tokenizer.temporal_stride
    pixels = frames * height * width * bundle.tokenizer.stride**2
    decode = bundle.decode if pixels <= DECODED_PIXELS else partial(_decode_long, bundle)
    count = max(1, DECODED_PIXELS // pixels)
    for rows, refined in bundle.generate_queue(
        complete,
        ids=ids,
        batch_size=batch_size,
        callback=partial(_each, callbacks) if callbacks else None,
    ):
        for begin in range(0, len(rows), count):
            part = slice(begin, begin + count)
            chunk, own = ids[rows[part]], (getattr(refined, field.name)[part] for field in fields(refined))
            yield Batch(chunk, labels[chunk], Refined(*own), decode)


class Refining:
    """A callback that tells how much of the refinement of `number` samples is done, in samples.

    Args:
        tell: is called with that, after every step.
    """

    def __init__(self, number: int, tell: Callable[[float], object]):
        self._reached, self._tell = torch.zeros(number, dtype=torch.float64), tell

    def __call__(self, step: Step) -> None:
        self._reached[step.rows] = step.t_next
        self._tell(float(self._reached.sum()))


def _each(callbacks: list[Callable[[Step], None]], step: Step) -> None:
    for callback in callbacks:
        callback(step)


def _decode_long(bundle: RefinerBundle, tokens: Tensor) -> Tensor:
    return torch.stack(list(bundle.decode_stream(tokens)), dim=2)


def _watch(callback: Callable[[Step], None], number: int, step: Step) -> None:
    """Calls back with what a step does to the first `number` samples, while it does anything to them."""
    rows = torch.nonzero(step.rows < number).squeeze(1)
    if len(rows):
        callback(step.select(rows))


def check_memory(
    bundle: RefinerBundle, request: CompleteRequest, *, batch_size: int, pictures: bool = False, recorded: int = 0
) -> None:
    """Before anything is allocated, by what no run can do without: the numbers and traces of all samples, and the
    logits of those that are refined at a time, with their probabilities.

    Args:
        pictures: whether the first frame of every sample is kept, too.
        recorded: of how many samples every step is kept (`grn.sampling.recording.Recording`), all latents of them.

    Raises:
        UserError: this machine, or the bundle's device, has not so much memory at all.
    """
    channels, latents, height, width = bundle.shape_of(request)
    stride = bundle.tokenizer.stride
    each = 64 + 4 * request.sampler.schedule.max_steps + (3 * height * width * stride**2 if pictures else 0)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if request.num * each > there:
        raise UserError(
            f"num={request.num}: samples of {each} bytes each take {request.num * each / 2**30:.3g} GiB, and this "
            f"machine has {there / 2**30:.3g}: ask for fewer"
        )
    steps = request.sampler.schedule.max_steps * recorded * (3 * channels + 4) * latents * height * width
    if steps > there / 2:
        raise UserError(
            f"the {request.sampler.schedule.max_steps} steps of {recorded} samples take {steps / 2**30:.3g} GiB to be "
            f"kept, and this machine has {there / 2**30:.3g}: fewer samples, smaller ones, or fewer steps"
        )
    at_a_time, logits = min(batch_size, request.num), 8 * bundle.network.classes * channels * latents * height * width
    info = getattr(torch.get_device_module(bundle.device), "mem_get_info", None)  # of accelerators that tell
    there = there if bundle.device.type == "cpu" else info(bundle.device)[1] if info else math.inf
    if at_a_time * logits > there:
        size = f"height={height * stride} width={width * stride} frames={request.frames} batch_size={batch_size}"
        raise UserError(
            f"{size}: logits and probabilities of {at_a_time} samples at a time, {logits} bytes each, take "
            f"{at_a_time * logits / 2**30:.3g} GiB, and {bundle.device} has {there / 2**30:.3g}: fewer, or smaller ones"
        )


def best_device(name: str | None) -> torch.device:
    """`name`, or the accelerator of this machine, or the CPU.

    Raises:
        UserError: no device, or none that is here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    here = ["cpu"] if accelerator is None else [accelerator.type, "cpu"]
    if device is None or device.type not in here:
        raise UserError(f"device={name}: this machine has {' and '.join(here)}; null takes the first of them")
    count = 1 if device.type == "cpu" else torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise UserError(f"device={name}: this machine has {count} of them, numbered from 0")
    return device
