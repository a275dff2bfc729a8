"""Pictures of a drawing: what a step saw, predicted and did to the tokens; and what became of one position."""

import base64
import io
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from grn.media.pictures import GROUND, STATE_COLOURS, single
from grn.sampling.films import state_pixels
from grn.sampling.recording import STATES
from grn.web.engine import Drawing

COLOURS = {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in zip(STATES, STATE_COLOURS)}
LOSSLESS = 512 * 512  # pixels; larger pictures are compressed as photographs are
LARGEST = 1536  # pixels a side of what is sent to the page
CACHED = 96 * 2**20  # bytes of pictures that are kept of each drawing


@dataclass(frozen=True)
class Layout:
    """Where samples stand in a picture: in `columns` x `rows` places, of height x width positions each."""

    samples: tuple[int, ...]
    columns: int
    rows: int
    height: int
    width: int

    @classmethod
    def of(cls, drawing: Drawing, focus: int | None = None) -> "Layout":
        """Of all samples of a drawing, as square as may be, or of one."""
        _, _, height, width = drawing.pipeline.bundle.shape_of(drawing.request)
        samples = tuple(range(drawing.request.num)) if focus is None else (focus,)
        columns = min(len(samples), max(1, math.ceil(math.sqrt(len(samples) * height / width))))
        return cls(samples, columns, math.ceil(len(samples) / columns), height, width)

    def place(self, cell: int) -> tuple[int, int, int] | None:
        """(Sample, row, column) of a position by its number in the whole picture, row by row; None beside them all."""
        if not 0 <= cell < self.rows * self.height * self.columns * self.width:
            return None
        y, x = divmod(cell, self.columns * self.width)
        number = y // self.height * self.columns + x // self.width
        return (self.samples[number], y % self.height, x % self.width) if number < len(self.samples) else None

    def cell(self, sample: int, row: int, column: int) -> int | None:
        """The inverse of `place`; None for a sample that is not shown."""
        if sample not in self.samples:
            return None
        down, right = divmod(self.samples.index(sample), self.columns)
        return (down * self.height + row) * self.columns * self.width + right * self.width + column

    def montage(self, pixels: Tensor) -> Image.Image:
        """uint8 [n, 3, H, W], a picture a sample -> all of them without gaps."""
        count, channels, height, width = pixels.shape
        ground = torch.tensor(GROUND, dtype=torch.uint8).view(1, channels, 1, 1)
        filled = ground.repeat(self.rows * self.columns, 1, height, width)
        filled[:count] = pixels
        rows = filled.view(self.rows, self.columns, channels, height, width).permute(2, 0, 3, 1, 4)
        return single(rows.reshape(channels, self.rows * height, self.columns * width))


@dataclass(frozen=True)
class Shown:
    """A step as data URLs: the map that the network saw, its prediction, and the states of the tokens."""

    seen: str
    predicted: str
    states: str


class Views:
    """Pictures of the steps of one drawing, the last ones kept. Its methods work with the tokenizer: on the engine's
    thread (`Engine.call`)."""

    def __init__(self, drawing: Drawing):
        self.drawing = drawing
        self._kept: OrderedDict[tuple, Shown] = OrderedDict()

    def forget(self, steps: int) -> None:
        """What was shown of all steps but the first ones is not so any more."""
        self._kept = OrderedDict((key, shown) for key, shown in self._kept.items() if key[0] <= steps)

    def step(self, number: int, *, focus: int | None = None, frame: int = 0) -> Shown:
        """
        Args:
            number: from 1.
            focus: one sample alone; None: all.
            frame: of clips.
        """
        key = (number, focus, frame)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        drawing, layout = self.drawing, Layout.of(self.drawing, focus)
        moment = drawing.recording.moments[number - 1]
        rows = torch.tensor(layout.samples)
        latent = self.latent(frame)
        both = torch.cat([moment.seen[rows], moment.predicted[rows]])
        pixels = self._frame(both, frame)
        states = moment.states[rows][:, :, latent : latent + 1].clone()
        if (redraw := self._redraw(rows)) is not None:  # a fifth color: that of what lies beside a picture
            states[~redraw[:, :, latent : latent + 1].expand_as(states)] = len(STATES)
        side = math.ceil(math.sqrt(states.shape[1]))
        squares = state_pixels(states, (layout.height * side, layout.width * side))
        shown = Shown(
            *(url(layout.montage(part)) for part in pixels.split(len(rows))), states=url(layout.montage(squares))
        )
        self._kept[key] = shown
        while len(self._kept) > 1 and sum(len(one.seen) + len(one.predicted) for one in self._kept.values()) > CACHED:
            self._kept.popitem(last=False)
        return shown

    def pictures(self) -> list[Image.Image]:
        """The samples of a drawing that is done; of clips their last frames."""
        assert self.drawing.refined is not None
        tokens = self.drawing.refined.tokens.to(self.drawing.pipeline.device)
        with torch.no_grad():
            *_, last = self.drawing.pipeline.bundle.decode_stream(tokens)
        return [single(pixels) for pixels in last.cpu()]

    @property
    def frames(self) -> int:
        """Of each sample; 1 of images."""
        latents = self.drawing.pipeline.bundle.shape_of(self.drawing.request)[1]
        return 1 + (latents - 1) * self.drawing.pipeline.bundle.tokenizer.temporal_stride

    def latent(self, frame: int) -> int:
        """The latent that a frame is decoded from."""
        return math.ceil(frame / self.drawing.pipeline.bundle.tokenizer.temporal_stride)

    def _frame(self, tokens: Tensor, frame: int) -> Tensor:
        """uint8 tokens [n, D, T, h, w] -> uint8 [n, 3, H, W]; of clips no more is decoded than leads there."""
        bundle, latent = self.drawing.pipeline.bundle, self.latent(frame)
        tokens = tokens[:, :, : latent + 1].long().to(bundle.device)
        with torch.no_grad():
            for number, pixels in enumerate(bundle.decode_stream(tokens)):
                if number == frame:
                    return pixels.cpu()
        raise IndexError(f"no frame {frame}")

    def _redraw(self, rows: Tensor) -> Tensor | None:
        start = self.drawing.request.start
        if start is None or start.redraw is None:
            return None
        redraw = start.redraw.cpu()
        return redraw[rows] if len(redraw) > 1 else redraw.expand(len(rows), -1, -1, -1, -1)


@dataclass(frozen=True)
class Visit:
    """What a step made of one position: its entropy in nats; of each channel its value in the map, the predicted one,
    and the state."""

    step: int
    entropy: float
    seen: tuple[int, ...]
    predicted: tuple[int, ...]
    states: tuple[str, ...]


def history(drawing: Drawing, sample: int, row: int, column: int, latent: int = 0) -> list[Visit]:
    """All that has become of a position, step by step, until the sample was done."""
    visits = []
    for number, moment in enumerate(drawing.recording.moments, 1):
        if moment.taken[sample] < number:
            break
        seen, predicted = (
            tuple(part[sample, :, latent, row, column].tolist()) for part in (moment.seen, moment.predicted)
        )
        states = tuple(STATES[state] for state in moment.states[sample, :, latent, row, column].tolist())
        entropy = moment.uncertainty[sample, latent, row, column].item()
        visits.append(Visit(number, entropy, seen, predicted, states))
    return visits


def curves(drawing: Drawing) -> dict[str, list[float]]:
    """By step: the mean entropy, and the shares of tokens kept, erased and drawn."""
    moments = list(drawing.recording.moments)
    shares = {state: [moment.share(state) for moment in moments] for state in STATES}
    drawn = [kept + filled for kept, filled in zip(shares["kept"], shares["filled"])]
    return {
        "t": [moment.t.mean().item() for moment in moments],
        "entropy": [moment.entropy.mean().item() for moment in moments],
        "kept": shares["kept"],
        "erased": shares["erased"],
        "drawn": drawn,
    }


def by_difficulty(drawing: Drawing) -> list[tuple[int, float, int]]:
    """(Sample, difficulty, steps) of all that are done, from the easiest: difficulty is the entropy at the step that
    decides on the number of steps, of fixed schedules the mean of all."""
    refined = drawing.refined
    if refined is None:
        return []
    adaptive = drawing.request.sampler.schedule.decide_at is not None
    difficulty = refined.decision_entropy if adaptive else refined.trace.nanmean(dim=1)
    found = zip(range(len(refined.steps)), difficulty.tolist(), refined.steps.tolist())
    return sorted(found, key=lambda one: one[1])


def url(picture: Image.Image) -> str:
    """As a data URL; small pictures pixel by pixel."""
    if max(picture.size) > LARGEST:
        picture = picture.copy()
        picture.thumbnail((LARGEST, LARGEST))
    buffer, is_small = io.BytesIO(), picture.width * picture.height <= LOSSLESS
    if is_small:
        picture.save(buffer, "PNG", compress_level=1)
    else:
        picture.save(buffer, "WEBP", quality=85, method=0)
    kind = "png" if is_small else "webp"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def positions(layout: Layout, cells: Sequence[int], latents: slice, total: int) -> dict[int, Tensor]:
    """Painted cells of a picture -> sample -> bool [total, h, w], in some of the latents."""
    found: dict[int, Tensor] = {}
    for cell in cells:
        if (place := layout.place(cell)) is None:
            continue
        sample, row, column = place
        mask = found.setdefault(sample, torch.zeros(total, layout.height, layout.width, dtype=torch.bool))
        mask[latents, row, column] = True
    return found
