"""python -m grn.sample ckpt=runs/digits_c2i labels=[3,7] num=16: pictures from a trained refiner (conf/sample.yaml)."""

import logging
import math
import time
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.progress import Progress

from grn import pictures
from grn.cli import entry_point
from grn.errors import UserError
from grn.files import write_json
from grn.generation import best_device, equal_labels, generate
from grn.initial_image import start_from_image
from grn.modules import build_sampler, load_refiner

log = logging.getLogger(__name__)


@entry_point("sample")
def main(config: DictConfig) -> None:
    config.out = HydraConfig.get().runtime.output_dir  # a sweep's points have a folder each
    sample(config)


def sample(config: DictConfig) -> Path:
    """Writes `samples.png`, `sorted.png`, `refinement.gif` and `samples.json` to `out`; returns that folder."""
    module, source = load_refiner(config.ckpt, ema=config.ema)
    sampler = build_sampler(config.sampler, module.sampler)
    device = best_device(config.device)
    module = module.to(device)
    labels = _labels(config, module.network.num_labels)
    start = start_from_image(module, config.init, strength=config.strength, mask=config.mask)

    started, batches = time.perf_counter(), []
    film = pictures.FilmRecorder(states=config.film_states) if config.film else None
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
        frames = film.frames(lambda tokens: module.decode(tokens.to(device)), columns=columns)
        pictures.save_film(frames, out / "refinement.gif")
    if config.images:
        for i, image in enumerate(images):
            pictures.save(
                pictures.grid(image[None], 1).crop((2, 2, 2 + image.shape[2], 2 + image.shape[1])),
                out / "images" / f"{i:05d}-{int(labels[i])}.png",
            )
    write_json(
        out / "samples.json",
        {
            **source,
            "sampler": repr(sampler),
            "seed": config.seed,
            "seconds": round(seconds, 2),
            "labels": labels.tolist(),
            "init": config.init,
            "mask": config.mask,
            "strength": None if start is None else start.strength,
            "steps": steps.tolist(),
            "entropy": [round(e, 5) for e in entropy.tolist()],
            "entropy_at_decision": [round(e, 5) for e in decision_entropy.tolist()],
            "entropy_trace": [[round(e, 5) for e in row[:taken].tolist()] for row, taken in zip(trace, steps)],
        },
    )
    log.info("%d samples in %.1f s: %s", len(labels), seconds, out)
    return out


def _labels(config: DictConfig, num_labels: int) -> torch.Tensor:
    labels = list(range(num_labels)) if config.labels is None else list(config.labels)
    bad = [label for label in labels if not isinstance(label, int) or not 0 <= label < num_labels]
    if bad or not labels:
        raise UserError(f"labels={labels}: labels of this checkpoint are 0..{num_labels - 1}")
    if config.num < 1:
        raise UserError(f"num={config.num}: at least one sample")
    return equal_labels(config.num, labels)


if __name__ == "__main__":
    main()
