"""A refinement as a self-contained HTML page: maps, predictions and token states of every step.

The pictures are inside the page, there is no network in it; it opens from disk, in mails, and in W&B.
"""

import base64
import html
import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from pathlib import Path

from PIL import Image
from torch import Tensor

from grn.media.pictures import STATE_COLOURS, step_grid
from grn.runtime.files import write_text
from grn.sampling.films import state_pixels
from grn.sampling.recording import STATES, Recording

LOSSLESS = 512 * 512  # pixels of a picture; larger ones are compressed as photographs are


def save_page(
    recording: Recording,
    decode: Callable[[Tensor], Iterable[Tensor]],
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    columns: int | None = None,
) -> Path:
    """Writes the page, atomically.

    Args:
        decode: int64 tokens [B, D, T, h, w] (CPU) -> frames, uint8 [B, 3, H, W] each, of which the last is shown.
        title: of the page.
        facts: what stands below the pictures, a line each, e.g. the command that draws them again.
        columns: of the grids of samples.
    """
    page = files("grn.sampling").joinpath("player.html").read_text()
    page = page.replace("__TITLE__", html.escape(title))
    # Within a script, only "</" could end it.
    data = json.dumps(_data(recording, decode, facts, columns)).replace("</", "<\\/")
    return write_text(path, page.replace("__DATA__", data))


def _data(
    recording: Recording, decode: Callable[[Tensor], Iterable[Tensor]], facts: Mapping[str, str], columns: int | None
) -> dict:
    def decoded(tokens: Tensor) -> Tensor:
        (last,) = deque(decode(recording.with_prefix(tokens)), maxlen=1)
        return last.cpu()

    steps, size = [], None
    for moment in recording.moments:
        seen, predicted = decoded(moment.seen), decoded(moment.predicted)
        pictures = {"seen": seen, "predicted": predicted, "states": state_pixels(moment.states, predicted.shape[-2:])}
        shown = {name: step_grid(pixels, columns) for name, pixels in pictures.items()}
        size = shown["seen"].size
        steps.append(
            {
                "step": int(moment.taken.max()),
                "t": round(moment.t.mean().item(), 4),
                "entropy": round(moment.entropy.mean().item(), 4),
                **{state: round(moment.share(state), 4) for state in STATES},
                **{name: data_url(picture) for name, picture in shown.items()},
            }
        )
    colours = {state: "#{:02x}{:02x}{:02x}".format(*colour) for state, colour in zip(STATES, STATE_COLOURS)}
    return {"steps": steps, "size": size, "colours": colours, "facts": dict(facts)}


def data_url(picture: Image.Image) -> str:
    """A picture inside a page: WebP, lossless up to `LOSSLESS` pixels."""
    buffer = io.BytesIO()
    lossless = picture.width * picture.height <= LOSSLESS
    picture.save(buffer, format="WEBP", lossless=lossless, quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
