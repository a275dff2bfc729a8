"""python -m grn.sample ckpt=runs/digits_c2i labels=[3,7] num=16: pictures from a trained refiner (conf/sample.yaml).

Of a text refiner: python -m grn.sample ckpt=runs/digits_t2i prompts=["a three left of an eight"]; of one of clips:
python -m grn.sample ckpt=runs/digits_t2v prompts=["a five falling"] frames=17, an mp4 each.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.progress import Progress

from grn import pictures
from grn.cli import entry_point
from grn.errors import UserError, check_count
from grn.files import write_json
from grn.generation import Batch, best_device, check_labels, equal_labels, generate
from grn.initial_clip import given_latents, start_from
from grn.modules import build_sampler, load_refiner
from grn.mp4 import save_mp4
from grn.training import RefinerModule, TextRefinerModule

log = logging.getLogger(__name__)

TEXT_KEYS = ("prompts", "negative_prompt", "height", "width", "frames")
MAX_PROMPTS_BYTES = 16 * 2**20


@entry_point("sample")
def main(config: DictConfig) -> None:
    config.out = HydraConfig.get().runtime.output_dir  # a sweep's points have a folder each
    sample(config)


def sample(config: DictConfig) -> Path:
    """Writes `samples.png`, `sorted.png`, `refinement.gif` and `samples.json` to `out`; returns that folder.

    Of clips, the pictures show the first frames, of those that go on from given ones the last; `refinement.gif` shows
    the first ones that are drawn. The clips are in `videos/<number>.mp4`.
    """
    check_count("num", config.num)
    check_count("batch_size", config.batch_size)
    if config.columns is not None:
        check_count("columns", config.columns)
    if type(config.seed) is not int:
        raise UserError(f"seed={config.seed}: a whole number")
    init, mask = (OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for v in (config.init, config.mask))
    module, source = load_refiner(config.ckpt, ema=config.ema)
    sampler = build_sampler(config.sampler, module.sampler)
    device = best_device(config.device)
    module = module.to(device)
    if isinstance(module, TextRefinerModule):
        labels = _ask(config, module)
    elif odd := next((key for key in TEXT_KEYS if config[key] is not None), None):
        raise UserError(f"{odd} is for text refiners, {config.ckpt} is one of classes: give labels=[0,1,...] instead")
    else:
        labels = _labels(config, module.num_labels)
    labels = equal_labels(config.num, labels)
    start = start_from(
        module,
        init,
        strength=config.strength,
        mask=mask,
        frames=config.init_frames,
        fps=config.fps,
    )

    clips = module.token_shape[1] > 1
    given = given_latents(start) if clips else 0

    started, batches = time.perf_counter(), []
    film = pictures.FilmRecorder(states=config.film_states, given=given) if config.film else None
    with Progress(transient=True) as progress, torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        task = progress.add_task("sampling", total=len(labels))
        for batch in generate(
            module,
            labels,
            batch_size=config.batch_size,
            seed=config.seed,
            sampler=sampler,
            start=start,
            watch_first=film,
        ):
            said = batch.refined
            if clips:
                shown = -1 if given else 0
                images = _save_clips(module, batch, Path(config.out), config.fps, progress, shown=shown)
            else:
                images = batch.images.cpu()
            batches.append((batch.ids, images, said.steps, said.entropy, said.decision_entropy, said.trace))
            progress.advance(task, len(batch.ids))
    seconds = time.perf_counter() - started

    out = Path(config.out)
    ids, *columns = map(torch.cat, zip(*batches))
    images, steps, entropy, decision_entropy, trace = (column[ids.argsort()] for column in columns)
    pictures.save(pictures.grid(images, config.columns, pictures.scale_for(images.shape[-1])), out / "samples.png")
    difficulty = trace.nanmean(dim=1) if sampler.schedule.decide_at is None else decision_entropy
    pictures.save(pictures.sorted_grid(images, difficulty, steps, config.columns), out / "sorted.png")
    if film is not None:
        columns = config.columns and math.ceil(config.columns / (1 + config.film_states))  # pairs are twice as wide
        frames = film.frames(lambda tokens: module.decode_stream(tokens.to(device)), columns=columns)
        pictures.save_film(frames, out / "refinement.gif")
    if config.images:
        for i, image in enumerate(images):
            pictures.save(pictures.single(image), out / "images" / f"{i:05d}-{int(labels[i])}.png")
    stride, (_, latents, *positions) = module.tokenizer.temporal_stride, module.token_shape
    height, width = (count * module.tokenizer.stride for count in positions)
    write_json(
        out / "samples.json",
        {
            **source,
            "sampler": repr(sampler),
            "seed": config.seed,
            "seconds": round(seconds, 2),
            "labels": labels.tolist(),
            "prompts": [module.prompts[label] for label in labels] if isinstance(module, TextRefinerModule) else None,
            "negative_prompt": module.negative_prompt if isinstance(module, TextRefinerModule) else None,
            "height": height,
            "width": width,
            "frames": 1 + (latents - 1) * stride,
            "fps": config.fps if clips else None,
            "init": init,
            "init_frames": 1 + (given - 1) * stride if given else None,
            "mask": mask,
            "strength": None if start is None else start.strength,
            "steps": steps.tolist(),
            "entropy": [round(e, 5) for e in entropy.tolist()],
            "entropy_at_decision": [round(e, 5) for e in decision_entropy.tolist()],
            "entropy_trace": [[round(e, 5) for e in row[:taken].tolist()] for row, taken in zip(trace, steps)],
        },
    )
    log.info("%d samples in %.1f s: %s", len(labels), seconds, out)
    return out


def _save_clips(
    module: RefinerModule, batch: Batch, out: Path, fps: float, progress: Progress, *, shown: int
) -> torch.Tensor:
    """Decodes clips frame by frame into `out/videos`, one after the other: memory does not grow with their length.

    Returns:
        The frames of number `shown` (-1: the last), uint8 [B, 3, H, W] on the CPU.
    """
    count = 1 + (batch.refined.tokens.shape[2] - 1) * module.tokenizer.temporal_stride
    task, kept = progress.add_task("decoding", total=count * len(batch.ids)), []

    def frames(tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        for number, frame in enumerate(module.decode_stream(tokens)):
            if number == shown % count:
                kept.append(frame.cpu())
            progress.advance(task)
            yield frame[0]

    for i, tokens in zip(batch.ids.tolist(), batch.refined.tokens.split(1)):
        save_mp4(frames(tokens), out / "videos" / f"{i:05d}.mp4", fps=fps)
    progress.remove_task(task)
    return torch.cat(kept)


def _ask(config: DictConfig, module: TextRefinerModule) -> list[int]:
    """Has the module sample as `config` asks; the numbers of the prompts."""
    if config.labels is not None:
        raise UserError(f"labels={config.labels}: {config.ckpt} takes texts, prompts=[...] or prompts=file.txt")
    module.ask_for(
        prompts=None if config.prompts is None else read_prompts(config.prompts),
        negative_prompt=None if config.negative_prompt is None else str(config.negative_prompt),
        height=config.height,
        width=config.width,
        frames=config.frames,
    )
    return list(range(module.num_labels))


def read_prompts(prompts: str | Sequence[str]) -> list[str]:
    """Prompts as given, or those of a UTF-8 text file, one a line.

    Raises:
        UserError: no such file, not of text, too large, something else, or no prompt at all.
    """
    if not isinstance(prompts, (str, Sequence)):
        raise UserError(f"prompts={prompts}: a list of texts, prompts=[...], or a text file, one a line")
    if not isinstance(prompts, str):
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
            raise UserError(f"prompts: {path} is no UTF-8 text") from None
        if len(data) > MAX_PROMPTS_BYTES:
            raise UserError(f"prompts: {path} has more than {MAX_PROMPTS_BYTES // 2**20} MiB")
    if not found:
        raise UserError(f"prompts={prompts}: at least one")
    return found


def _labels(config: DictConfig, num_labels: int) -> list[int]:
    given = config.labels if isinstance(config.labels, ListConfig) else [config.labels]
    labels = list(range(num_labels) if config.labels is None else given)
    check_labels(labels, num_labels)
    return labels


if __name__ == "__main__":
    main()
