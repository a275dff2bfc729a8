"""Sampling in Python, in the habits of diffusers: `GRNPipeline.from_pretrained("runs/digits_c2i")(labels=[3]).images`.

One pipeline for refiners of classes and of texts, of images and of clips; its samples are those of
`python -m grn.sample` with the same seed.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from grn.cli import MISTAKES, explain
from grn.errors import UserError, check_count
from grn.generation import check_labels
from grn.initial_clip import Init, start_from
from grn.modules import load_refiner, save_refiner
from grn.networks.pretrained import HUB, is_hub_id
from grn.pictures import single
from grn.sampler import EntropyGuided, Linear, Sampler, Schedule, Step
from grn.training import RefinerModule, TextRefinerModule

Output = Literal["pil", "pt", "tokens"]


@dataclass(frozen=True)
class PipelineOutput:
    """N samples, on the CPU.

    images: a list of Pillow's, or uint8 [N, 3, H, W] (output="pt"), or None (of clips, and with output="tokens").
    frames: of clips, a list of those of each, or uint8 [N, T, 3, H, W] (output="pt"), or None;
    `grn.mp4.save_mp4(frames[0], "clip.mp4", fps=16)` writes one of the latter. tokens: int64 [N, D, T', h, w]. steps:
    int64 [N], taken. entropy: float32 [N], normalised to [0, 1], of the last prediction. seed: what draws the same
    samples again.
    """

    images: list[Image.Image] | Tensor | None
    frames: list[list[Image.Image]] | Tensor | None
    tokens: Tensor
    steps: Tensor
    entropy: Tensor
    seed: int


class GRNPipeline:
    """A refiner with all that sampling needs: `from_pretrained` loads one.

    Args:
        module: a refiner in evaluation mode.
    """

    def __init__(self, module: RefinerModule):
        self.module = module

    @classmethod
    def from_pretrained(
        cls,
        ckpt: str | Path,
        *,
        ema: str | float | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "GRNPipeline":
        """The pipeline of a trained refiner, on the CPU; nothing in what is read is executed.

        Args:
            ckpt: a folder of `save_pretrained` or `grn.export`, or one on the Hugging Face Hub (`owner/name`, or
                `hf://owner/name`); or a run folder or checkpoint file of ours.
            ema: of a run: the decay of the average to sample from, `none` for the weights as trained; None: as it did.
            dtype: as `to` has it; None: float32.
            revision, cache_dir, token, local_files_only: of the Hub, as in `huggingface_hub.snapshot_download`.

        Raises:
            UserError: nothing of that kind is there.
        """
        ckpt = str(ckpt)
        if not Path(ckpt).expanduser().exists() and is_hub_id(ckpt):
            ckpt = f"{HUB}{ckpt}"
        try:
            module, _ = load_refiner(
                ckpt,
                ema=ema,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
            )
        except MISTAKES as error:  # Hydra wraps what is wrong with a run's parts
            raise UserError(explain(error)) from None
        return cls(module).to(dtype)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes a folder for `from_pretrained`, `grn.sample` and `grn.evaluate`: all of it or nothing.

        Of a frozen text encoder it only says where that is to be had.

        Args:
            folder: a new or an empty one, or an earlier one of this kind, which is replaced.

        Raises:
            UserError: `folder` holds something else.
        """
        return save_refiner(self.module, folder)

    @property
    def device(self) -> torch.device:
        return self.module.device

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> "GRNPipeline":
        """Moves all of it to `device`, and the refiner, with the text encoder trained along, to `dtype`; returns it.

        The tokenizer and a frozen text encoder keep their precision.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if device is not None:
            self.module.to(device)
        if dtype is not None:
            self.module.network.to(dtype)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        labels: int | Sequence[int] | None = None,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        steps: int | Literal["entropy"] | Schedule | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        init: Init | None = None,
        init_frames: int | None = None,
        fps: float = 16,
        strength: float | None = None,
        mask: Image.Image | str | Path | None = None,
        batch_size: int | None = None,
        callback_on_step: Callable[[Step], None] | None = None,
        progress: bool = True,
        output: Output = "pil",
    ) -> PipelineOutput:
        """Samples. What is None is as the refiner was trained to be sampled.

        Args:
            prompt: of a refiner of texts: one or several.
            labels: of a refiner of classes: one or several.
            negative_prompt: of a refiner of texts: what guidance leads away from.
            num_images_per_prompt: of each prompt or label; they stand side by side in the output. Image k of prompt p
                of P is sample k * P + p of `grn.sample` with this seed, so that more of them do not change the first.
            height, width: in pixels, of a refiner of texts.
            frames: of clips, 1 + 4k, of a refiner of texts; 1: images.
            steps: so many, in equal steps of t (where it was trained to be sampled along a cosine, along that);
                "entropy": more of them for harder samples; or any schedule of `grn.sampler`.
            guidance, guidance_interval, temperature: of `grn.sampler.Sampler`.
            seed: an image is a function of it, what is asked for, and its number.
            generator: what a seed is drawn from, where none is given; None: torch's own.
            init, strength, mask: an image that all samples start from, as `grn.initial_image.start_from_image` has it.
            init, init_frames, fps: of clips, what they go on from, as `grn.initial_clip.start_from_clip` has it.
            batch_size: samples at a time; None: all of them.
            callback_on_step: called after every step; `Step.rows` are places in the output.
            progress: shows a bar.
            output: "pil", "pt" or "tokens": what `images` of the output are.

        Raises:
            UserError: something asked for that cannot be done.
        """
        if output not in get_args(Output):
            raise UserError(f"output={output}: choose among {', '.join(get_args(Output))}")
        check_count("num_images_per_prompt", num_images_per_prompt)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        module, wanted = self._asked(prompt, labels, negative_prompt, height, width, frames)
        sampler = self._sampler(steps, guidance, guidance_interval, temperature)
        seed = _seed(seed, generator)
        start = start_from(module, init, strength=strength, mask=mask, frames=init_frames, fps=fps)

        number = len(wanted) * num_images_per_prompt
        sample_of = torch.arange(number).view(num_images_per_prompt, -1).T.flatten()  # of each place in the output
        place_of, done = sample_of.argsort(), []
        with _bar(number, progress) as advance:

            def watch(step: Step) -> None:
                advance(step)
                if callback_on_step is not None:
                    callback_on_step(replace(step, rows=place_of[step.rows]))

            for rows, refined in module.generate_queue(
                wanted.repeat(num_images_per_prompt).to(module.device),
                seed=seed,
                ids=torch.arange(number, device=module.device),
                batch_size=batch_size or number,
                sampler=sampler,
                start=None if start is None else start.expand(number),
                callback=watch,
            ):
                clips = [] if output == "tokens" else [_decoded(module, refined.tokens)]
                done.append((rows, refined.tokens.cpu(), refined.steps, refined.entropy, *clips))
        rows, *columns = map(torch.cat, zip(*done))
        tokens, taken, entropy, *clips = (column[rows.argsort()][sample_of] for column in columns)
        images = moving = None
        if clips and module.token_shape[1] > 1:
            moving = [[single(frame) for frame in clip] for clip in clips[0]] if output == "pil" else clips[0]
        elif clips:
            images = [single(clip[0]) for clip in clips[0]] if output == "pil" else clips[0][:, 0]
        return PipelineOutput(images=images, frames=moving, tokens=tokens, steps=taken, entropy=entropy, seed=seed)

    def _asked(
        self,
        prompt: str | Sequence[str] | None,
        labels: int | Sequence[int] | None,
        negative_prompt: str | None,
        height: int | None,
        width: int | None,
        frames: int | None,
    ) -> tuple[RefinerModule, Tensor]:
        """(A module that samples what is asked for, the numbers, int64, by which it knows that)."""
        if not isinstance(self.module, TextRefinerModule):
            of_texts = {"prompt": prompt, "negative_prompt": negative_prompt, "height": height, "width": width}
            of_texts["frames"] = frames
            if odd := next((name for name, value in of_texts.items() if value is not None), None):
                raise UserError(
                    f"{odd} is for refiners of texts, this one is of classes: give labels=[0, 1, ...] instead"
                )
            asked = list(labels) if isinstance(labels, Iterable) else [] if labels is None else [labels]
            check_labels(asked, self.module.num_labels)
            return self.module, torch.tensor(asked)
        if labels is not None:
            raise UserError(f"labels={labels} are for refiners of classes, this one is of texts: give a prompt instead")
        prompts = list(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, str) else [prompt]
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise UserError(f"prompt={prompt}: a text, or a list of some")
        if not isinstance(negative_prompt, str | None):
            raise UserError(f"negative_prompt={negative_prompt}: one text")
        module = copy.copy(self.module)  # the same networks; what it draws where nobody asks stays as it is
        module.ask_for(prompts=prompts, negative_prompt=negative_prompt, height=height, width=width, frames=frames)
        return module, torch.arange(len(prompts))

    def _sampler(
        self,
        steps: int | str | Schedule | None,
        guidance: float | None,
        guidance_interval: tuple[float, float] | None,
        temperature: float | None,
    ) -> Sampler:
        own = self.module.sampler
        schedule = own.schedule if steps is None else steps
        if schedule == "entropy":
            schedule = own.schedule if isinstance(own.schedule, EntropyGuided) else EntropyGuided()
        elif type(schedule) is int:
            schedule = replace(own.schedule, steps=schedule) if isinstance(own.schedule, Linear) else Linear(schedule)
        elif not callable(getattr(schedule, "signal_ratio", None)):
            raise UserError(f'steps={steps}: a whole number, "entropy", or a schedule such as grn.sampler.Cosine(50)')
        for name, value in (("guidance", guidance), ("temperature", temperature)):
            if value is not None and not isinstance(value, int | float):
                raise UserError(f"{name}={value}: a number")
        chosen = {"guidance": guidance, "guidance_interval": guidance_interval, "temperature": temperature}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        try:
            return replace(own, schedule=schedule, **chosen)
        except (TypeError, ValueError):
            raise UserError(f"guidance_interval={guidance_interval}: two numbers, (low, high)") from None


def _decoded(module: RefinerModule, tokens: Tensor) -> Tensor:
    """int64 [B, D, T', h, w] -> uint8 [B, T, 3, H, W] on the CPU, in memory elsewhere that does not grow with T."""
    if tokens.shape[2] == 1:
        return module.decode(tokens).transpose(1, 2).cpu()
    return torch.stack([frame.cpu() for frame in module.decode_stream(tokens)], dim=1)


def _seed(seed: int | None, generator: torch.Generator | None) -> int:
    if seed is not None:
        if generator is not None:
            raise UserError(f"seed={seed}: give it or a generator, not both")
        if type(seed) is not int:
            raise UserError(f"seed={seed}: a whole number")
        return seed
    if not isinstance(generator, torch.Generator | None):
        raise UserError(f"generator={generator}: one torch.Generator; every image has draws of its own")
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


@contextmanager
def _bar(number: int, is_shown: bool) -> Iterator[Callable[[Step], None]]:
    """What to call after every step; the bar shows how much of all samples' refinement is done."""
    come = torch.zeros(number, dtype=torch.float64)
    with Progress(transient=True, disable=not is_shown) as progress:
        task = progress.add_task("sampling", total=number)

        def advance(step: Step) -> None:
            come[step.rows] = step.t_next
            progress.update(task, completed=float(come.sum()))

        yield advance
