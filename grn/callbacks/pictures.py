"""Logs sample grids and films to `<run folder>/pictures` and the loggers."""

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from grn.callbacks.validations import is_last_validation, logged_step
from grn.media import pictures
from grn.media.pixels import as_frames
from grn.runtime.trainer import Trainer
from grn.sampling import films
from grn.sampling.player import save_page
from grn.sampling.recording import Recording
from grn.sampling.request import Request
from grn.training import RefinerModule, TokenizerModule


class SampleGrid(Callback):
    """Samples a grid with every validation, always the same classes and noise, so that grids can be compared.

    Args:
        folder: where `samples-step<step>.png` goes; of clips, it shows the first frames, and
            `samples-step<step>.mp4` all of them.
        num: how many samples; the classes take turns.
        seed: of the sampling.
        fps: of clips, frames a second.
    """

    def __init__(self, folder: str, num: int = 40, seed: int = 0, fps: float = 16):
        self.folder, self.num, self.seed, self.fps = Path(folder), num, seed, fps

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: RefinerModule) -> None:
        if trainer.sanity_checking:
            return
        tokens = pl_module.bundle.generate(Request(num=self.num, seed=self.seed)).tokens
        frames = pl_module.bundle.decode_stream(tokens)
        images = next(frames)
        classes = pl_module.bundle.num_conditions
        columns = classes if self.num % classes == 0 and self.num > classes else None  # a class a column
        wanted = pl_module.bundle.complete(Request()).wanted
        captions = [str(wanted[number % len(wanted)]) for number in range(self.num)]
        picture = pictures.grid(images, columns, pictures.scale_for(images.shape[-1]), captions)
        name = f"samples-step{trainer.global_step:07d}"
        pictures.save(picture, self.folder / f"{name}.png")
        _log_image(trainer, "sample/grid", picture, caption=" | ".join(dict.fromkeys(captions)))
        if tokens.shape[2] > 1:
            frames = chain([images], frames)
            path = pictures.save_clips(frames, self.folder / f"{name}.mp4", fps=self.fps, columns=columns)
            _log_video(trainer, "sample/clips", path)


class ReconstructionGrid(Callback):
    """Held-out images, or frames of held-out clips, above their reconstructions, with every validation.

    Args:
        folder: where `reconstructions-step<step>.png` goes; one picture a data set where several are validated.
        num: how many images of the first held-out batch; of clips, how many frames.
    """

    def __init__(self, folder: str, num: int = 16):
        self.folder, self.num = Path(folder), num
        self._first: dict[int, Tensor] = {}  # number of the data set -> pixels of rank 0's first batch, if it has one

    @rank_zero_only
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            self._first[dataloader_idx] = batch["pixels"][: self.num]

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: TokenizerModule) -> None:
        first, self._first = self._first, {}
        if trainer.sanity_checking:
            return
        for number, pixels in first.items():
            pixels = pixels[: math.ceil(self.num / pixels.shape[2])]  # of clips, as many as show `num` frames
            pair = [as_frames(x)[: self.num] for x in (pixels, pl_module.reconstruct(pixels))]
            picture = pictures.grid(torch.cat(pair), len(pair[0]), pictures.scale_for(pixels.shape[-1]))
            suffix = f"-{number}" if number else ""
            pictures.save(picture, self.folder / f"reconstructions{suffix}-step{trainer.global_step:07d}.png")
            _log_image(trainer, f"reconstruction/grid{suffix}", picture)


class RefinementFilm(Callback):
    """A GIF, and a page to step through, of one sample a class (16 at most) being refined, at the end of training.

    Args:
        folder: where `refinement.gif` and `refinement.html` go.
        seed: of the sampling.
    """

    def __init__(self, folder: str, seed: int = 0):
        self.folder, self.seed = Path(folder), seed

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: RefinerModule) -> None:
        if trainer.sanity_checking or not is_last_validation(trainer):
            return
        num = min(16, pl_module.bundle.num_conditions)
        recording, request = Recording(), pl_module.bundle.complete(Request(num=num, seed=self.seed))
        pl_module.bundle.generate(request, callback=recording)

        def decode(tokens: Tensor) -> Iterator[Tensor]:
            return pl_module.bundle.decode_stream(tokens.to(pl_module.bundle.device))

        path = pictures.save_film(films.film(recording, decode), self.folder / "refinement.gif")
        _log_video(trainer, "sample/film", path)
        title, shown = f"GRN: step {trainer.global_step}", ", ".join(map(str, request.wanted[:num]))
        page = save_page(recording, decode, self.folder / "refinement.html", title=title, facts={"shown": shown})
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb  # takes its time, and has it taken already where there is such a logger

                of_page: dict[str, Any] = {"sample/page": wandb.Html(str(page))}
                logger.log_metrics(of_page, step=logged_step(trainer))


def _log_image(trainer: Trainer, key: str, picture: Image.Image, caption: str | None = None) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [picture], step=logged_step(trainer), caption=[caption])


def _log_video(trainer: Trainer, key: str, path: Path) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_video(key, [str(path)], step=logged_step(trainer), format=[path.suffix.removeprefix(".")])
