"""Files of a drawing to keep: pictures, films, a page, tokens, and what draws it again. All on the engine's thread."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from grn.data.samples import to_tensor
from grn.media import pictures
from grn.media.mp4 import save_mp4
from grn.runtime.errors import UserError
from grn.sampling.films import film
from grn.sampling.player import save_page
from grn.sampling.recording import Recording
from grn.sampling.reproduce import as_command, as_python, start_bytes, write_erasures
from grn.web.engine import Drawing


def png(drawing: Drawing, steps: int) -> bytes:
    """The predictions of all samples after so many steps, of the last one the samples; of clips their last frames."""
    tokens = drawing.recording.with_prefix(drawing.recording.moments[steps - 1].predicted)
    *_, images = _decode(drawing)(tokens)
    labels = drawing.request.wanted
    captions = [str(labels[number % len(labels)]) for number in range(drawing.request.num)]
    picture = pictures.grid(images.cpu(), None, pictures.scale_for(images.shape[-1]), captions)
    return _written("png", lambda path: pictures.save(picture, path))


def gif(drawing: Drawing) -> bytes:
    """The refinement as a film of all steps; of clips of their first frames that are drawn."""
    return _written("gif", lambda path: pictures.save_film(_film(drawing), path))


def mp4(drawing: Drawing, *, fps: float = 16) -> bytes:
    """Of images the film of the refinement; of clips the samples, side by side."""
    if drawing.recording.moments[-1].seen.shape[2] == 1:
        frames = [_even(frame) for frame in _film(drawing)]
        return _written("mp4", lambda path: save_mp4(frames + frames[-1:] * 8, path, fps=8))
    tokens = drawing.recording.with_prefix(drawing.recording.moments[-1].predicted)
    decoded = (frame.cpu() for frame in _decode(drawing)(tokens))
    return _written("mp4", lambda path: pictures.save_clips(decoded, path, fps=fps))


def page(drawing: Drawing, ckpt: str) -> bytes:
    """The page of `grn.sample html=true`."""
    facts = {"command": as_command(ckpt, drawing.request, files(drawing))}
    title = f"GRN: {ckpt}, seed {drawing.request.seed}"
    recording = _first_latent(drawing)
    return _written("html", lambda path: save_page(recording, _decode(drawing), path, title=title, facts=facts))


def tokens(drawing: Drawing, steps: int) -> bytes:
    """Safetensors `tokens` uint8 [N, D, T, h, w], the predictions after so many steps; `start=` of `grn.sample`."""
    return start_bytes(drawing.tokens_after(steps))


def start(drawing: Drawing) -> bytes:
    """What the samples started from, for `start=` of `grn.sample`."""
    given = drawing.request.start
    if given is None:
        raise UserError("the samples started from noise alone")
    return start_bytes(given.tokens, given.strength, given.redraw)


def erasures(drawing: Drawing) -> bytes:
    """For `erasures=` of `grn.sample`."""
    return _written("json", lambda path: write_erasures(path, drawing.erasures))


def files(drawing: Drawing) -> dict[str, str]:
    """Names of the files that the command and the snippet read, by their keys."""
    needed = {"start": drawing.request.start is not None, "erasures": bool(drawing.erasures)}
    names = {"start": "start.safetensors", "erasures": "erasures.json"}
    return {key: names[key] for key, is_needed in needed.items() if is_needed}


def command(drawing: Drawing, ckpt: str) -> str:
    """`grn sample ...` that draws the samples again."""
    return as_command(ckpt, drawing.request, files(drawing))


def snippet(drawing: Drawing, ckpt: str) -> str:
    """The same in Python."""
    return as_python(ckpt, drawing.request, **files(drawing))


def _film(drawing: Drawing) -> list[Image.Image]:
    return film(_first_latent(drawing), _decode(drawing))


def _first_latent(drawing: Drawing) -> Recording:
    """The recording as films have it: of clips the first latent that is drawn."""
    whole = drawing.recording
    given, latents = drawing.given, whole.moments[0].seen.shape[2]
    if latents == 1:
        return whole
    shown = Recording(given=given)
    shown.prefix = whole.moments[0].seen[:, :, :given]
    part = slice(given, given + 1)
    for moment in whole.moments:
        cut = {name: getattr(moment, name)[:, :, part] for name in ("seen", "predicted", "states")}
        shown.moments.append(type(moment)(**vars(moment) | cut | {"uncertainty": moment.uncertainty[:, part]}))
    return shown


def _decode(drawing: Drawing) -> Callable[[Tensor], Iterator[Tensor]]:
    bundle = drawing.pipeline.bundle

    def decode(tokens: Tensor) -> Iterator[Tensor]:
        with torch.no_grad():
            yield from bundle.decode_stream(tokens.to(bundle.device))

    return decode


def _even(picture: Image.Image) -> Tensor:
    """uint8 [3, H, W] with even sides, as H.264 wants them."""
    pixels = to_tensor(picture)[:, 0]
    return pixels[:, : pixels.shape[1] // 2 * 2, : pixels.shape[2] // 2 * 2]


def _written(suffix: str, write: Callable[[Path], object]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file.{suffix}"
        write(path)
        return path.read_bytes()
