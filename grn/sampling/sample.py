"""Samples of a trained refiner, as pictures and clips: what `python -m grn.sample` does."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image
from rich.progress import Progress

from grn.checkpoints.sampler_config import build_sampler
from grn.media import pictures
from grn.media.mp4 import save_mp4
from grn.runs.wandb_runs import log_results
from grn.runtime.errors import UserError, check_count
from grn.runtime.files import write_json
from grn.runtime.wandb_login import wandb_offline
from grn.sampling import films
from grn.sampling.bundle import RefinerBundle
from grn.sampling.generation import Batch, Refining, best_device, check_memory, generate
from grn.sampling.loading import load_refiner
from grn.sampling.official import load_official_refiner
from grn.sampling.player import save_page
from grn.sampling.recording import Recording
from grn.sampling.refinement import Start, given_latents
from grn.sampling.reproduce import as_command, read_erasures, read_start
from grn.sampling.request import CompleteRequest, Request
from grn.sampling.sizes import resolve_size
from grn.sampling.start_clip import start_from
from grn.sampling.text_bundle import TextRefinerBundle

log = logging.getLogger(__name__)

TEXT_KEYS = ("prompts", "negative_prompt", "height", "width", "frames", "aspect", "pixels", "duration")
MAX_PROMPTS_BYTES = 16 * 2**20


def sample(config: DictConfig) -> Path:
    """Writes `samples.png`, `sorted.png`, `refinement.gif` and `samples.json` to `out`; returns that folder.

    With `html=true` also `refinement.html`, with `init` also `start.png`. Of clips, the pictures show the first frames,
    of those that go on from given ones the last; the film shows the first ones that are drawn. The clips are in
    `videos/<number>.mp4`.
    """
    check_count("num", config.num)
    check_count("batch_size", config.batch_size)
    if config.columns is not None:
        check_count("columns", config.columns)
    both: Any = [OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for v in (config.init, config.mask)]
    init, mask = both
    if config.task is None:
        bundle, source = load_refiner(config.ckpt, ema=config.ema)
    else:
        bundle, source = load_official_refiner(
            config.ckpt, task=config.task, size=config.model_size, size_key="model_size", ema=config.ema
        )
    device = best_device(config.device)
    bundle = bundle.to(device)
    request = bundle.complete(_request(config, bundle))
    check_memory(bundle, request, batch_size=config.batch_size, pictures=True)
    shape = bundle.shape_of(request)
    start = start_from(
        bundle,
        init,
        shape=shape,
        strength=None if config.start is not None else config.strength,
        mask=mask,
        frames=config.init_frames,
        fps=config.fps,
        started=config.start is not None,
    )
    if config.start is not None:
        if init is not None:
            raise UserError(f"start={config.start} and init={init}: give one of them")
        start = read_start(config.start, strength=config.strength).to(device)
    erasures = () if config.erasures is None else read_erasures(config.erasures)
    request = replace(request, start=start, erasures=erasures)

    clips = shape[1] > 1
    given = given_latents(start) if clips else 0

    started, batches = time.perf_counter(), []
    recording = Recording(given=given) if config.film or config.html else None
    with Progress(transient=True) as progress, torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        task = progress.add_task("sampling", total=request.num)
        for batch in generate(
            bundle,
            request,
            batch_size=config.batch_size,
            watch=Refining(request.num, lambda done: progress.update(task, completed=done)),
            watch_first=recording,
        ):
            said = batch.refined
            if clips:
                shown = -1 if given else 0
                images = _save_clips(bundle, batch, Path(config.out), config.fps, progress, shown=shown)
            else:
                images = batch.images.cpu()
            batches.append((batch.ids, images, said.steps, said.entropy, said.decision_entropy, said.trace))
    seconds = time.perf_counter() - started

    out = Path(config.out)
    ids, *columns = map(torch.cat, zip(*batches))
    images, steps, entropy, decision_entropy, trace = (column[ids.argsort()] for column in columns)
    wanted = range(len(request.wanted)) if request.labels is None else request.labels
    labels = [wanted[number % len(wanted)] for number in range(request.num)]
    captions = [str(request.wanted[number % len(wanted)]) for number in range(request.num)]
    scale = pictures.scale_for(images.shape[-1])
    pictures.save(pictures.grid(images, config.columns, scale, captions), out / "samples.png")
    difficulty = trace.nanmean(dim=1) if request.sampler.schedule.decide_at is None else decision_entropy
    pictures.save(pictures.sorted_grid(images, difficulty, steps, config.columns), out / "sorted.png")
    if start is not None:
        pictures.save(_start_picture(bundle, start, given), out / "start.png")
    if recording is not None:
        _show(config, bundle, request, recording, out)
    if config.images:
        for i, image in enumerate(images):
            pictures.save(pictures.single(image), out / "images" / f"{i:05d}-{labels[i]}.png")
    used, negative = request.prompts, None
    if used is not None and isinstance(bundle, TextRefinerBundle):
        negative = request.negative_prompt
        taken = bundle.text_encoder.tokenization
        *used, negative = (taken.used(text) if taken.is_cut(text) else text for text in (*used, negative))
    stride, (_, latents, *positions) = bundle.tokenizer.temporal_stride, shape
    height, width = (count * bundle.tokenizer.stride for count in positions)
    write_json(
        out / "samples.json",
        {
            **source,
            "sampler": repr(request.sampler),
            "seed": request.seed,
            "seconds": round(seconds, 2),
            "labels": labels,
            "prompts": None if used is None else [used[label] for label in labels],
            "negative_prompt": negative,
            "height": height,
            "width": width,
            "frames": 1 + (latents - 1) * stride,
            "fps": config.fps if clips else None,
            "init": init,
            "start": config.start,
            "init_frames": 1 + (given - 1) * stride if given else None,
            "mask": mask,
            "strength": None if start is None else start.strength,
            "steps": steps.tolist(),
            "entropy": [round(e, 5) for e in entropy.tolist()],
            "entropy_at_decision": [round(e, 5) for e in decision_entropy.tolist()],
            "entropy_trace": [[round(e, 5) for e in row[:taken].tolist()] for row, taken in zip(trace, steps)],
        },
    )
    if config.wandb:
        shown = {"sample/samples": out / "samples.png", "sample/sorted": out / "sorted.png"}
        shown |= {"sample/refinement": out / "refinement.gif"} if config.film else {}
        shown |= {"sample/steps_mean": steps.double().mean().item(), "sample/seconds": round(seconds, 2)}
        log_results(source["ckpt"], shown, step=source["step"], offline=wandb_offline())
    log.info("%d samples in %.1f s: %s", request.num, seconds, out)
    return out


def _show(config: DictConfig, bundle: RefinerBundle, request: CompleteRequest, recording: Recording, out: Path) -> None:
    """Writes the film and the page of a recording, as `config` asks for them."""

    def decode(tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        return bundle.decode_stream(tokens.to(bundle.device))

    if config.film:
        columns = config.columns and math.ceil(config.columns / (1 + config.film_states))  # pairs are twice as wide
        frames = films.film(recording, decode, states=config.film_states, columns=columns)
        pictures.save_film(frames, out / "refinement.gif")
    if config.html:
        extra = ("task", "model_size", "init", "init_frames", "mask", "start", "strength", "erasures", "ema")
        given = {key: config[key] for key in extra}
        given |= {"fps": config.fps if request.frames > 1 else None, "bf16": config.bf16 or None}
        command = as_command(config.ckpt, request, {key: value for key, value in given.items() if value is not None})
        facts = {
            "command": command,
            "prompts" if request.labels is None else "classes": ", ".join(map(str, request.wanted)),
        }
        title = f"GRN: {config.ckpt}, seed {request.seed}"
        columns = min(config.columns or 10, math.ceil(math.sqrt(request.num)))
        save_page(recording, decode, out / "refinement.html", title=title, facts=facts, columns=columns)


def _start_picture(bundle: RefinerBundle, start: Start, given: int) -> Image.Image:
    """What samples started from, decoded from its tokens, and beside it in white what is redrawn."""
    tokens = start.tokens if given == 0 else start.tokens[:, :, :given]
    *_, image = bundle.decode_stream(tokens.to(bundle.device))
    if start.redraw is None or given:
        return pictures.grid(image, None, pictures.scale_for(image.shape[-1]), ["start"] * len(image))
    redraw = 255 * start.redraw[:, 0, :1].to(torch.uint8).repeat_interleave(3, dim=1)
    redraw = torch.nn.functional.interpolate(redraw, size=tuple(image.shape[-2:]), mode="nearest")
    both = torch.stack([image.cpu(), redraw.cpu()], dim=1).flatten(0, 1)
    captions = ["start", "drawn anew: white"] * len(image)
    return pictures.grid(both, 2, pictures.scale_for(image.shape[-1]), captions)


def _save_clips(
    bundle: RefinerBundle, batch: Batch, out: Path, fps: float, progress: Progress, *, shown: int
) -> torch.Tensor:
    """Decodes clips frame by frame into `out/videos`, one after the other: memory does not grow with their length.

    Returns:
        The frames of number `shown` (-1: the last), uint8 [B, 3, H, W] on the CPU.
    """
    count = 1 + (batch.refined.tokens.shape[2] - 1) * bundle.tokenizer.temporal_stride
    task, kept = progress.add_task("decoding", total=count * len(batch.ids)), []

    def frames(tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        for number, frame in enumerate(bundle.decode_stream(tokens)):
            if number == shown % count:
                kept.append(frame.cpu())
            progress.advance(task)
            yield frame[0]

    for i, tokens in zip(batch.ids.tolist(), batch.refined.tokens.split(1)):
        save_mp4(frames(tokens), out / "videos" / f"{i:05d}.mp4", fps=fps)
    progress.remove_task(task)
    return torch.cat(kept)


def _request(config: DictConfig, bundle: RefinerBundle) -> Request:
    """What `config` asks for, but for what samples start from."""
    is_text = isinstance(bundle, TextRefinerBundle)
    if is_text and config.labels is not None:
        raise UserError(f"labels={config.labels}: {config.ckpt} takes texts, prompts=[...] or prompts=file.txt")
    if not is_text and (odd := next((key for key in TEXT_KEYS if config[key] is not None), None)):
        raise UserError(f"{odd} is for text refiners, {config.ckpt} is one of classes: give labels=[0,1,...] instead")
    labels = config.labels if isinstance(config.labels, ListConfig) else [config.labels]
    keys = ("height", "width", "frames", "aspect", "pixels", "duration", "fps")
    height, width, frames = resolve_size(bundle, **{key: config[key] for key in keys}) if is_text else (None,) * 3
    return Request(
        labels=None if config.labels is None else tuple(labels),
        prompts=None if config.prompts is None else tuple(read_prompts(config.prompts)),
        negative_prompt=None if config.negative_prompt is None else str(config.negative_prompt),
        height=height,
        width=width,
        frames=frames,
        num=config.num,
        sampler=build_sampler(config.sampler, bundle.sampler),
        seed=config.seed,
    )


def read_prompts(prompts: str | Sequence[str]) -> list[str]:
    """Prompts as given, or those of a UTF-8 text file, one a line.

    Raises:
        UserError: no such file, not of text, too large, something else, or no prompt at all.
    """
    if not isinstance(prompts, (str, Sequence)):
        raise UserError(f"prompts={prompts}: a list of texts, prompts=[...], or a text file, one a line")
    if not isinstance(prompts, str):
        if odd := [prompt for prompt in prompts if type(prompt) not in (str, int, float)]:
            raise UserError(f"prompts={list(prompts)}: {odd[0]} is not text")
        found = [str(prompt) for prompt in prompts]
    else:
        path = Path(prompts).expanduser()
        try:
            with path.open("rb") as file:
                data = file.read(MAX_PROMPTS_BYTES + 1)
            found = [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
        except OSError:
            raise UserError(f"prompts: no file {path}; prompts themselves are given as a list: prompts=[...]") from None
        except UnicodeDecodeError:
            raise UserError(f"prompts: {path} is not UTF-8 text") from None
        if len(data) > MAX_PROMPTS_BYTES:
            raise UserError(f"prompts: {path} has more than {MAX_PROMPTS_BYTES // 2**20} MiB")
    if not found:
        raise UserError(f"prompts={prompts}: at least one")
    return found
