"""Sampling in Python, in the habits of diffusers: `GRNPipeline.from_pretrained("runs/digits_c2i")(labels=[3]).images`.

One pipeline for refiners of classes and of texts, of images and of clips; its samples are those of
`python -m grn.sample` with the same seed. A call makes a `Request` of its arguments; `stream` takes one step by step.
"""

import functools
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from grn.media.pictures import single
from grn.method.sampler import Sampler, Step
from grn.method.schedules import EntropyGuided, Schedule, fixed, grid_of
from grn.networks.adapters import load_adapters, merged
from grn.runtime.errors import UserError, check_count, check_number
from grn.runtime.failures import MISTAKES, explain
from grn.sampling.bundle import RefinerBundle
from grn.sampling.generation import Batch, Refining, best_device, generate
from grn.sampling.loading import load_refiner, save_refiner
from grn.sampling.official import load_official_refiner
from grn.sampling.refinement import Refinement
from grn.sampling.request import AnyRequest, CompleteRequest, Request
from grn.sampling.sizes import resolve_size
from grn.sampling.start_clip import Init, start_from
from grn.sampling.text_bundle import TextRefinerBundle
from grn.weights.kinds import HUB
from grn.weights.pretrained import is_hub_id, upload

Output = Literal["pil", "pt", "np", "latent"]


@dataclass(frozen=True)
class PipelineOutput:
    """N samples, on the CPU.

    images: a list of Pillow's; uint8 [N, 3, H, W] (output_type="pt"); float32 [N, H, W, 3] in [0, 1] ("np"); or None
    (of clips, and with "latent"). frames: of clips, a list of those of each, uint8 [N, T, 3, H, W], float32
    [N, T, H, W, 3], or None; `grn.media.mp4.save_mp4(frames[0], "clip.mp4", fps=16)` writes one of the second. tokens:
    int64 [N, D, T', h, w]. steps: int64 [N], taken. entropy: float32 [N], normalized to [0, 1], of the last prediction.
    seed: what draws the same samples again; of several generators, a list. height, width, num_frames: of each
    sample, in pixels and frames.
    """

    images: list[Image.Image] | Tensor | np.ndarray | None
    frames: list[list[Image.Image]] | Tensor | np.ndarray | None
    tokens: Tensor
    steps: Tensor
    entropy: Tensor
    seed: int | list[int]
    height: int
    width: int
    num_frames: int


class GRNPipeline:
    """A refiner with all that sampling needs: `from_pretrained` loads one.

    Args:
        bundle: a refiner in evaluation mode.
    """

    def __init__(self, bundle: RefinerBundle):
        self.bundle = bundle
        self._progress: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        ckpt: str | Path,
        *,
        task: str | None = None,
        size: str | None = None,
        ema: str | float | None = None,
        torch_dtype: torch.dtype | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "GRNPipeline":
        """The pipeline of a trained refiner, on the CPU; nothing in what is read is executed.

        Args:
            ckpt: a folder of `save_pretrained` or `grn.export`, or one on the Hugging Face Hub (`owner/name`, or
                `hf://owner/name`); or a run folder or checkpoint file of ours; with `task`, the authors' repository,
                `bytedance-research/GRN`, or a folder or mirror with files of the same names.
            task, size: which of the authors' weights: `t2i`, `t2v`, `i2v` (a clip that goes on from `image`) or `c2i`,
                and of these `2B`, `8B`, ... (None: the first there is). They choose the files, the attention, how to
                sample and what prompts stand between (`grn.weights.releases`); a line of the log tells it.
            ema: of a run: the decay of the average to sample from, `none` for the weights as trained; None: as it did.
            torch_dtype: as `to` has it for `dtype`; None: float32.
            revision, cache_dir, token, local_files_only: of the Hub, as in `huggingface_hub.snapshot_download`.

        Raises:
            UserError: nothing of that kind is there.
        """
        ckpt = str(ckpt)
        if not Path(ckpt).expanduser().exists() and is_hub_id(ckpt):
            ckpt = f"{HUB}{ckpt}"
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        try:
            if task is None:
                if size is not None:
                    raise UserError(f'size={size} is of the authors\' weights: give task="t2i", too')
                bundle, _ = load_refiner(ckpt, ema=ema, **hub)
            else:
                bundle, _ = load_official_refiner(ckpt, task=task, size=size, ema=ema, **hub)
        except MISTAKES as error:  # Hydra wraps what is wrong with a run's parts
            raise UserError(explain(error)) from None
        return cls(bundle).to(torch_dtype)

    def load_lora_weights(self, path: str | Path, *, scale: float = 1.0) -> "GRNPipeline":
        """Merges adapters that `grn.export format=adapters` wrote into the weights of a text refiner; returns it.

        Args:
            scale: of what they add; 1 as they were trained, -1 takes them out again, up to rounding.

        Raises:
            UserError: no such file, or adapters of another refiner.
        """
        if not isinstance(self.bundle, TextRefinerBundle):
            raise UserError("adapters are of text refiners, and this is one of classes")
        check_number("scale", scale, least=-1e3, most=1e3)
        adapters, own = load_adapters(path)
        refiner = self.bundle.refiner
        refiner.load_state_dict(merged(refiner.state_dict(), adapters, scale * own, source=str(path)))
        return self

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes a folder for `from_pretrained`, `grn.sample` and `grn.evaluate`: all of it or nothing.

        Of a frozen text encoder it only says where that is to be had.

        Args:
            folder: a new or an empty one, or an earlier one of this kind, which is replaced.

        Raises:
            UserError: `folder` holds something else.
        """
        return save_refiner(self.bundle, folder)

    def push_to_hub(
        self, hub_id: str, *, private: bool = False, revision: str | None = None, token: str | bool | None = None
    ) -> str:
        """Uploads what `save_pretrained` writes to the repository `owner/name` on the Hub, which is made where missing.

        Returns:
            the URL of the commit.

        Raises:
            UserError: the Hub refuses, or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save_pretrained(Path(scratch) / "export")
            return upload(folder, hub_id, private=private, revision=revision, token=token)

    @property
    def device(self) -> torch.device:
        return self.bundle.device

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> "GRNPipeline":
        """Moves all of it to `device`, and the refiner, with the text encoder trained along, to `dtype`; returns it.

        The tokenizer and a frozen text encoder keep their precision.

        Raises:
            UserError: there is no such device here; the pipeline then stays where it is.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if device is not None:
            _check_device(device)
            self.bundle.to(device)
        if dtype is not None:
            self.bundle.network.to(dtype)
        return self

    def enable_model_cpu_offload(self, device: torch.device | str | None = None) -> "GRNPipeline":
        """Moves the refiner and the tokenizer to `device`, and a frozen text encoder only while it encodes prompts.

        Of umT5-XXL that saves 11 GB of the device's memory while samples are refined. Class refiners have no such part.

        Args:
            device: None: the accelerator of this machine.
        """
        device = _check_device(best_device(None) if device is None else device)
        if isinstance(self.bundle, TextRefinerBundle):
            self.bundle.offload_encoder(device)
        else:
            self.bundle.to(device)
        return self

    def set_progress_bar_config(self, **config: Any) -> None:
        """`disable=True` shows no bars; other settings are those of `rich.progress.Progress`."""
        self._progress = config

    def __repr__(self) -> str:
        kind = "texts" if isinstance(self.bundle, TextRefinerBundle) else f"{self.bundle.num_conditions} classes"
        _, latents, rows, columns = self.bundle.token_shape
        stride, tokenizer = self.bundle.tokenizer.stride, self.bundle.tokenizer
        size = f"{rows * stride}x{columns * stride}"
        if latents > 1:
            size += f", {1 + (latents - 1) * tokenizer.temporal_stride} frames"
        millions = sum(parameter.numel() for parameter in self.bundle.network.parameters()) / 1e6
        return (
            f"GRNPipeline(a refiner of {kind}, {millions:.2f} M parameters, {size}, {self.bundle.network.channels} "
            f"tokens of {self.bundle.network.classes} values a position, {self.bundle.sampler}, on {self.device})"
        )

    def request(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        labels: int | Sequence[int] | None = None,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        aspect: str | float | None = None,
        pixels: str | None = None,
        duration: float | None = None,
        num_inference_steps: int | Literal["entropy"] | Schedule | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        temperature: float | None = None,
        update: Literal["redraw", "psi"] | None = None,
        kappa: float | None = None,
        kappa_form: Literal["constant", "rescaled"] | None = None,
        kappa_window: tuple[float, float] | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        image: Init | None = None,
        image_frames: int | None = None,
        fps: float = 16,
        strength: float | None = None,
        mask_image: Image.Image | str | Path | None = None,
    ) -> CompleteRequest:
        """What `stream` and `sample` take; arguments as of `__call__`, what they leave open filled in.

        Raises:
            UserError: something asked for that cannot be done.
        """
        check_count("num_images_per_prompt", num_images_per_prompt)
        asked = {"aspect": aspect, "pixels": pixels, "duration": duration}
        wanted = self._wanted(prompt, labels, negative_prompt, height, width, num_frames, asked)
        if isinstance(self.bundle, TextRefinerBundle):
            size = resolve_size(
                self.bundle, height=height, width=width, frames=num_frames, fps=fps, frames_key="num_frames", **asked
            )
            wanted = replace(wanted, **dict(zip(("height", "width", "frames"), size)))
        wanted = replace(
            wanted,
            num=len(wanted.wanted) * num_images_per_prompt,
            sampler=self._sampler(
                num_inference_steps,
                guidance=guidance_scale,
                guidance_interval=guidance_interval,
                temperature=temperature,
                update=update,
                kappa=kappa,
                kappa_form=kappa_form,
                kappa_window=kappa_window,
            ),
            seed=_seed(seed, generator),
        )
        request = self.bundle.complete(wanted)
        start = start_from(
            self.bundle,
            image,
            shape=self.bundle.shape_of(request),
            strength=strength,
            mask=mask_image,
            frames=image_frames,
            fps=fps,
            names=("image", "mask_image"),
        )
        return replace(request, start=start)

    def stream(self, request: AnyRequest) -> Refinement:
        """The refinement of all samples of a request, an iterator over its steps; it can be paused and changed.

        for step in pipeline.stream(request): ... shows `step.predicted`, decoded by `decode`. Between two steps,
        `erase` puts tokens back to noise; the same request with the `Erasure`s it returned draws the same samples.
        """
        complete = self.bundle.complete(request)
        return self.bundle.refinement(complete, batch_size=complete.num)

    def sample(
        self,
        request: AnyRequest,
        *,
        batch_size: int | None = None,
        watch: Callable[[Step], None] | None = None,
        watch_first: Callable[[Step], None] | None = None,
    ) -> Iterator[Batch]:
        """The samples of a request, `batch_size` (None: all) at a time; see `grn.sampling.generation.generate`."""
        complete = self.bundle.complete(request)
        size = complete.num if batch_size is None else batch_size
        return generate(self.bundle, complete, batch_size=size, watch=watch, watch_first=watch_first)

    def decode(self, tokens: Tensor) -> Tensor:
        """int64 tokens [B, D, T', h, w] -> uint8 pixels [B, T, 3, H, W] on the CPU; of clips, frame by frame."""
        tokens = tokens.to(self.device)
        if tokens.shape[2] == 1:
            return self.bundle.decode(tokens).transpose(1, 2).cpu()
        return torch.stack([frame.cpu() for frame in self.bundle.decode_stream(tokens)], dim=1)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        labels: int | Sequence[int] | None = None,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        aspect: str | float | None = None,
        pixels: str | None = None,
        duration: float | None = None,
        num_inference_steps: int | Literal["entropy"] | Schedule | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        temperature: float | None = None,
        update: Literal["redraw", "psi"] | None = None,
        kappa: float | None = None,
        kappa_form: Literal["constant", "rescaled"] | None = None,
        kappa_window: tuple[float, float] | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        image: Init | None = None,
        image_frames: int | None = None,
        fps: float = 16,
        strength: float | None = None,
        mask_image: Image.Image | str | Path | None = None,
        batch_size: int | None = None,
        callback_on_step_end: Callable[["GRNPipeline", int, float, dict[str, Step]], object] | None = None,
        output_type: Output = "pil",
    ) -> PipelineOutput:
        """Samples. What is None is as the refiner was trained to be sampled.

        Args:
            prompt: of a refiner of texts: one or several.
            labels: of a refiner of classes: one or several.
            negative_prompt: of a refiner of texts: what guidance leads away from.
            num_images_per_prompt: of each prompt or label; they stand side by side in the output. Image k of prompt p
                of P is sample k * P + p of `grn.sample` with this seed, so that more of them do not change the first.
            height, width: in pixels, of a refiner of texts.
            num_frames: of clips, 1 + 4k, of a refiner of texts; 1: images.
            aspect, pixels, duration: in their place: "16:9", "1M", seconds at `fps`; the nearest of training's sizes is
                drawn (`grn.sampling.sizes.resolve_size`), which the output tells.
            num_inference_steps: so many, along the grid that it was trained to be sampled along (equal steps of t, a
                cosine, or the shifted cosine of text); "entropy": more of them for harder samples, along the same grid;
                or any schedule of `grn.method.schedules`.
            guidance_scale, guidance_interval, temperature, update, kappa, kappa_form, kappa_window: of
                `grn.method.sampler.Sampler`.
            seed: an image is a function of it, what is asked for, and its number.
            generator: what a seed is drawn from, where none is given; None: torch's own. Of a list, one for each image:
                that is then image 0 of its own seed.
            image, strength, mask_image: what all samples start from (`grn.sampling.start_image.start_from_image`).
            image, image_frames, fps: of clips, what they go on from (`grn.sampling.start_clip.start_from_clip`).
            batch_size: samples at a time; None: all of them.
            callback_on_step_end: called after every step with the pipeline, how many steps came before, the largest t
                of the samples, and {"step": the `Step`}, whose `rows` are places in the output.
            output_type: "pil", "pt" (uint8 tensors), "np" (float32 arrays in [0, 1], channels last) or "latent" (none:
                the tokens alone).

        Raises:
            UserError: something asked for that cannot be done.
        """
        if output_type not in get_args(Output):
            raise UserError(f"output_type={output_type}: choose among {', '.join(get_args(Output))}")
        if batch_size is not None:
            check_count("batch_size", batch_size)
        ask = functools.partial(
            self.request,
            prompt,
            labels=labels,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            aspect=aspect,
            pixels=pixels,
            duration=duration,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            temperature=temperature,
            update=update,
            kappa=kappa,
            kappa_form=kappa_form,
            kappa_window=kappa_window,
            image=image,
            image_frames=image_frames,
            fps=fps,
            strength=strength,
            mask_image=mask_image,
        )
        draw = functools.partial(
            self._draw, batch_size=batch_size, callback=callback_on_step_end, output_type=output_type
        )
        if not isinstance(generator, Sequence):
            return draw(ask(seed=seed, generator=generator), each=num_images_per_prompt)
        whole = ask(seed=0 if seed is None else seed)
        wanted = [what for what in whole.wanted for _ in range(num_images_per_prompt)]
        if seed is not None or len(generator) != len(wanted):
            raise UserError(f"generator: give one, or a list of one for each of {len(wanted)} images, and no seed")
        kind, seeds = "labels" if whole.prompts is None else "prompts", [_seed(None, own) for own in generator]
        made = [draw(replace(whole, **{kind: (what,)}, num=1, seed=own), each=1) for what, own in zip(wanted, seeds)]
        same = ("seed", "height", "width", "num_frames")
        parts = {name: _joined([vars(one)[name] for one in made]) for name in vars(made[0]) if name not in same}
        return PipelineOutput(**parts, seed=seeds, **{name: getattr(made[0], name) for name in same[1:]})

    def _draw(
        self,
        request: CompleteRequest,
        *,
        each: int,
        batch_size: int | None,
        callback: Callable[["GRNPipeline", int, float, dict[str, Step]], object] | None,
        output_type: Output,
    ) -> PipelineOutput:
        """All samples of a request, those of one label or prompt side by side, of which there are `each`."""
        sample_of = torch.arange(request.num).view(each, -1).T.flatten()  # of each place in the output
        place_of, done = sample_of.argsort(), []
        with Progress(transient=True, **self._progress) as progress:
            task = progress.add_task("sampling", total=request.num)
            refining = Refining(request.num, lambda come: progress.update(task, completed=come))
            count = itertools.count()

            def watch(step: Step) -> None:
                refining(step)
                if callback is not None:
                    seen = replace(step, rows=place_of[step.rows])
                    callback(self, next(count), float(step.t_next.max()), {"step": seen})

            for batch in self.sample(request, batch_size=batch_size, watch=watch):
                said = batch.refined
                clips = [] if output_type == "latent" else [self.decode(said.tokens)]
                done.append((batch.ids, said.tokens.cpu(), said.steps, said.entropy, *clips))
        ids, *columns = map(torch.cat, zip(*done))
        tokens, taken, entropy, *clips = (column[ids.argsort()][sample_of] for column in columns)
        images = moving = None
        if clips and tokens.shape[2] > 1:
            moving = _converted(clips[0], output_type)
        elif clips:
            images = _converted(clips[0][:, :1], output_type)
            images = [clip[0] for clip in images] if output_type == "pil" else images[:, 0]
        stride, temporal_stride = self.bundle.tokenizer.stride, self.bundle.tokenizer.temporal_stride
        return PipelineOutput(
            images=images,
            frames=moving,
            tokens=tokens,
            steps=taken,
            entropy=entropy,
            seed=request.seed,
            height=tokens.shape[3] * stride,
            width=tokens.shape[4] * stride,
            num_frames=1 + (tokens.shape[2] - 1) * temporal_stride,
        )

    def _wanted(
        self,
        prompt: str | Sequence[str] | None,
        labels: int | Sequence[int] | None,
        negative_prompt: str | None,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        asked: dict[str, Any],
    ) -> Request:
        """What to draw, checked as far as the bundle's own words would name other arguments than these."""
        if not isinstance(self.bundle, TextRefinerBundle):
            of_texts = {"prompt": prompt, "negative_prompt": negative_prompt, "height": height, "width": width}
            of_texts |= {"num_frames": num_frames, **asked}
            if odd := next((name for name, value in of_texts.items() if value is not None), None):
                raise UserError(
                    f"{odd} is for refiners of texts, this one is of classes: give labels=[0, 1, ...] instead"
                )
            several = labels if isinstance(labels, Iterable) else [] if labels is None else [labels]
            return Request(labels=tuple(several))
        if labels is not None:
            raise UserError(f"labels={labels} are for refiners of classes, this one is of texts: give a prompt instead")
        several = list(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, str) else [prompt]
        prompts = tuple(text for text in several if isinstance(text, str))
        if not several or len(prompts) < len(several):
            raise UserError(f"prompt={prompt}: a text, or a list of some")
        if num_frames is not None and type(num_frames) is not int:
            raise UserError(f"num_frames={num_frames}: a whole number of frames")
        return Request(prompts=prompts, negative_prompt=negative_prompt, height=height, width=width, frames=num_frames)

    def _sampler(
        self,
        steps: int | str | Schedule | None,
        **chosen: Any,
    ) -> Sampler:
        own = self.bundle.sampler
        schedule = own.schedule if steps is None else steps
        if schedule == "entropy":
            is_adaptive = isinstance(own.schedule, EntropyGuided)
            schedule = own.schedule if is_adaptive else EntropyGuided(**grid_of(own.schedule))
        elif type(schedule) is int:
            schedule = fixed(own.schedule, schedule)
        elif not callable(getattr(schedule, "signal_ratio", None)):
            raise UserError(
                f'num_inference_steps={steps}: a whole number, "entropy", or a schedule of grn.method.schedules'
            )
        chosen = {name: value for name, value in chosen.items() if value is not None}
        for name in chosen.keys() & {"guidance", "temperature", "kappa"}:
            if not isinstance(chosen[name], int | float):
                raise UserError(f"{'guidance_scale' if name == 'guidance' else name}={chosen[name]}: a number")
        try:
            return replace(own, schedule=schedule, **chosen)
        except (TypeError, ValueError):
            pairs = {name: chosen[name] for name in ("guidance_interval", "kappa_window") if name in chosen}
            raise UserError(f"{', '.join(f'{k}={v}' for k, v in pairs.items())}: two numbers, (low, high)") from None


def _check_device(device: torch.device | str) -> torch.device:
    """Raises:
    UserError: there is no such device here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device={device}: there is none here ({reason})") from None


def _converted(clips: Tensor, output_type: Output) -> Any:
    """uint8 [N, T, 3, H, W] -> N lists of T pictures; the same; or float32 [N, T, H, W, 3] in [0, 1]."""
    if output_type == "pil":
        return [[single(frame) for frame in clip] for clip in clips]
    return clips if output_type == "pt" else clips.movedim(2, -1).numpy().astype("float32") / 255


def _joined(parts: list[Any]) -> Any:
    if parts[0] is None:
        return None
    if isinstance(parts[0], list):
        return [one for part in parts for one in part]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else np.concatenate(parts)


def _seed(seed: int | None, generator: torch.Generator | None) -> int:
    if seed is not None:
        if generator is not None:
            raise UserError(f"seed={seed}: give it or a generator, not both")
        if type(seed) is not int:
            raise UserError(f"seed={seed}: a whole number")
        return seed
    if not isinstance(generator, torch.Generator | None):
        raise UserError(f"generator={generator}: a torch.Generator, or a list of one for each image")
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))
