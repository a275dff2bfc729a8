"""Pictures that a run leaves in `<run folder>/pictures` and in its loggers."""

import math
from itertools import chain
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from grn import pictures
from grn.callbacks.validations import is_last_validation
from grn.generation import equal_labels
from grn.pixels import as_frames


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
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        labels = equal_labels(self.num, range(pl_module.num_labels)).to(pl_module.device)
        ids = torch.arange(self.num, device=pl_module.device)
        tokens = pl_module.generate(labels, seed=self.seed, ids=ids).tokens
        frames = pl_module.decode_stream(tokens)
        images = next(frames)
        columns = pl_module.num_labels if self.num % pl_module.num_labels == 0 else None
        picture = pictures.grid(images, columns, pictures.scale_for(images.shape[-1]))
        name = f"samples-step{trainer.global_step:07d}"
        pictures.save(picture, self.folder / f"{name}.png")
        _log_image(trainer, "sample/grid", picture)
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

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaders = trainer.val_dataloaders
        for number, loader in enumerate(loaders if isinstance(loaders, list) else [loaders]):
            pixels = next(iter(loader))["pixels"][: self.num].to(pl_module.device)
            pixels = pixels[: math.ceil(self.num / pixels.shape[2])]  # of clips, as many as show `num` frames
            pair = [as_frames(x)[: self.num] for x in (pixels, pl_module.reconstruct(pixels))]
            picture = pictures.grid(torch.cat(pair), len(pair[0]), pictures.scale_for(pixels.shape[-1]))
            suffix = f"-{number}" if number else ""
            pictures.save(picture, self.folder / f"reconstructions{suffix}-step{trainer.global_step:07d}.png")
            _log_image(trainer, f"reconstruction/grid{suffix}", picture)


class RefinementFilm(Callback):
    """A GIF of one sample a class (16 at most) being refined, at the end of training.

    Args:
        folder: where `refinement.gif` goes.
        seed: of the sampling.
    """

    def __init__(self, folder: str, seed: int = 0):
        self.folder, self.seed = Path(folder), seed

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_last_validation(trainer):
            return
        num = min(16, pl_module.num_labels)
        labels = torch.arange(num, device=pl_module.device)
        recorder = pictures.FilmRecorder()
        pl_module.generate(labels, seed=self.seed, ids=torch.arange(num, device=pl_module.device), callback=recorder)
        frames = recorder.frames(lambda tokens: pl_module.decode_stream(tokens.to(pl_module.device)))
        path = pictures.save_film(frames, self.folder / "refinement.gif")
        _log_video(trainer, "sample/film", path)


def _log_image(trainer: Trainer, key: str, picture: Image.Image) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [picture], step=trainer.global_step)


def _log_video(trainer: Trainer, key: str, path: Path) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_video(key, [str(path)], format=[path.suffix.removeprefix(".")])
