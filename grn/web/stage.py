"""Pictures of drawings as they go on, and the player that steers them: used wherever refinements are watched."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nicegui import ui

from grn.web.engine import Drawing, inpainting
from grn.web.session import Session, complain
from grn.web.token_image import TokenImage
from grn.web.views import COLOURS, Layout, Views, positions

PANELS = {
    "seen": "map that the network sees",
    "predicted": "its prediction",
    "states": "what becomes of each token",
}
MEANINGS = {
    "filled": "filled: now a prediction",
    "kept": "kept: the prediction of before",
    "erased": "erased: noise again",
    "blank": "blank: noise still",
}
SPEEDS = {0.25: "4 steps/s", 0.125: "8 steps/s", 0.06: "16 steps/s", 0.03: "fastest"}


class Stage:
    """The pictures of a step of a drawing.

    Attributes:
        views, drawing: None before the first one.
        at: the step that is shown, from 1; 0: none yet.
        focus: the sample that is shown alone; None: all. frame: of clips.
        painted: cells (`Layout.place`) that are to be erased.
        on_step, on_pick, on_paint: called after another step is shown, with a cell that was clicked, and after
            `painted` has changed.
    """

    def __init__(self, session: Session, *, panels: Sequence[str] = tuple(PANELS), name: str = "") -> None:
        self._session = session
        self.views: Views | None = None
        self.at, self.frame = 0, 0
        self.focus: int | None = None
        self.painted: set[int] = set()
        self.on_step: list[Callable[[], Any]] = []
        self.on_pick: Callable[[int], Any] = lambda cell: None
        self.on_paint: list[Callable[[], Any]] = []
        self._images: dict[str, TokenImage] = {}
        with ui.element("div").classes("studio-views" if len(panels) == 3 else "studio-views two"):
            for panel in panels:
                with ui.element("div").classes(f"studio-view {panel}"):
                    image = TokenImage(PANELS[panel], on_stroke=self._paint, on_pick=lambda cell: self.on_pick(cell))
                    image.props(f"data-testid={marked(name, panel)}")
                    ui.label(PANELS[panel]).classes("studio-soft")
                    self._images[panel] = image

    @property
    def drawing(self) -> Drawing | None:
        return None if self.views is None else self.views.drawing

    @property
    def layout(self) -> Layout:
        assert self.drawing is not None  # only what is drawn is laid out
        return Layout.of(self.drawing, self.focus)

    @property
    def is_masked(self) -> bool:
        """Whether some tokens are given, and not drawn."""
        start = self.drawing.request.start if self.drawing else None
        return start is not None and start.redraw is not None

    def watch(self, drawing: Drawing) -> None:
        """Another drawing, of which no step is shown yet."""
        self.views = Views(drawing)
        self.at, self.focus, self.frame = 0, None, 0
        self.clear()
        self.select(None)

    async def show(self, step: int) -> None:
        """Shows a step that was taken."""
        views, focus, frame = self.views, self.focus, self.frame
        if views is None:
            return
        try:
            shown = await self._session.work(lambda: views.step(step, focus=focus, frame=frame))
        except IndexError:  # the drawing went back meanwhile
            return
        except Exception as error:
            complain(error)
            return
        if views is not self.views or (focus, frame) != (self.focus, self.frame):
            return  # another was asked for meanwhile
        self.at = step
        for panel, image in self._images.items():
            image.show(getattr(shown, panel), layout=self.layout)
        for tell in self.on_step:
            tell()

    async def look(self, *, focus: int | None = None, frame: int = 0) -> None:
        """Shows one sample alone (None: all), or another frame of clips."""
        if (focus, frame) == (self.focus, self.frame):
            return
        if focus != self.focus:
            self.clear()
        self.focus, self.frame = focus, frame
        if self.at:
            await self.show(self.at)

    def tool(self, mode: str, brush: int) -> None:
        """`inspect` or `erase`; brush: positions on each side of the pointer's."""
        for image in self._images.values():
            image.show(mode=mode, brush=brush)

    def select(self, cell: int | None) -> None:
        """Marks a position."""
        for image in self._images.values():
            image.show(selected=cell)

    def clear(self) -> None:
        """Takes back what is painted and not erased yet."""
        self._painted(set())

    async def refine_on(self, *, all_frames: bool = True, strength: float = 1.0) -> Drawing | None:
        """Erases what is painted at the step that is shown, and goes on; of samples that are done there, inpaints.

        Returns:
            the drawing that goes on: this one, of finished samples another; None where something is wrong, which is
            said on the page.
        """
        views, at, engine = self.views, self.at, self._session.studio.engine
        if views is None or not self.painted or not at:
            return None
        drawing = views.drawing
        total = drawing.pipeline.bundle.shape_of(drawing.request)[1]
        latent = views.latent(self.frame)
        latents = slice(drawing.given, None) if all_frames else slice(latent, latent + 1)
        erased = positions(self.layout, sorted(self.painted), latents, total)
        try:
            if not any(drawing.can_erase(sample, at) for sample in erased):
                return engine.draw(drawing.pipeline, inpainting(drawing, erased, strength=strength))
            await asyncio.wrap_future(engine.change(drawing, at, erased))
        except Exception as error:
            complain(error)
            return None
        views.forget(at)
        self.clear()
        return drawing

    def _paint(self, cells: Sequence[int], erase: bool) -> None:
        if self.drawing is None or not self.at:
            return
        layout = self.layout
        inside = {cell for cell in cells if layout.place(cell) is not None}
        self._painted(self.painted | inside if erase else self.painted - inside)

    def _painted(self, cells: set[int]) -> None:
        self.painted = cells
        for image in self._images.values():
            image.show(painted=sorted(cells))
        for tell in self.on_paint:
            tell()


class Player:
    """Play and pause, a scrubber, the speed, and a line about the step; of several stages, all at the same step.

    Drawings go on as fast as they can, and are shown at the player's pace. Pausing pauses them, too.

    Attributes:
        at: the step, from 1. playing: whether it goes on by itself.
    """

    def __init__(self, session: Session, stages: Sequence[Stage], *, name: str = "") -> None:
        self._engine, self._stages = session.studio.engine, stages
        self.at, self.playing = 0, False
        with ui.element("div").classes("studio-row studio-player"):
            self._play = ui.button(icon="play_arrow", on_click=self.toggle)
            self._play.props(f"round dense unelevated aria-label=play data-testid={marked(name, 'play')}")
            for icon, by, label, mark in (
                ("skip_previous", -1, "a step back", "back"),
                ("skip_next", 1, "a step on", "next"),
            ):
                button = ui.button(icon=icon, on_click=partial(self._go_by, by))
                button.props(f"flat round dense aria-label='{label}' data-testid={marked(name, mark)}")
            self._slider = ui.slider(min=1, max=2, value=1).classes("studio-slider")
            self._slider.props(f"aria-label=step data-testid={marked(name, 'scrubber')}")
            self._slider.on("update:model-value", lambda it: self.go(int(it.args)), throttle=0.05)
            speed = ui.select(SPEEDS, value=0.125).props("dense borderless options-dense aria-label=speed")
            speed.props(f"data-testid={marked(name, 'speed')}").classes("studio-speed")
        self._now = ui.label().classes("studio-now").props(f"aria-live=polite data-testid={marked(name, 'now')}")
        self._timer = ui.timer(0.125, self.tick)
        speed.on_value_change(lambda it: setattr(self._timer, "interval", it.value))
        for stage in stages:
            stage.on_paint.append(lambda stage=stage: self.pause() if stage.painted else None)

    @property
    def _drawings(self) -> list[Drawing]:
        return [stage.drawing for stage in self._stages if stage.drawing is not None]

    @property
    def _steps(self) -> int:
        return max((drawing.steps for drawing in self._drawings), default=0)

    def play(self, *, at: int | None = None) -> None:
        """Goes on, from a step where one is given; from the end, from the beginning."""
        if at is not None:
            self.at = at
        elif self.at >= self._steps and all(drawing.is_over for drawing in self._drawings):
            self.at = 0
        self.playing = bool(self._drawings)
        for drawing in self._drawings:
            self._engine.resume(drawing)

    def pause(self) -> None:
        self.playing = False
        for drawing in self._drawings:
            self._engine.pause(drawing)

    def toggle(self) -> None:
        self.pause() if self.playing else self.play()
        self._say()

    async def go(self, step: int) -> None:
        """Shows a step, and stays there."""
        if self._steps:
            self.pause()
            await self._show(min(max(1, step), self._steps))

    async def _go_by(self, steps: int) -> None:
        await self.go(self.at + steps)

    async def tick(self) -> None:
        """Goes on by a step where there is one."""
        if self.playing:
            ready = all(drawing.is_over or drawing.steps > self.at for drawing in self._drawings)
            if ready and self.at < self._steps:
                await self._show(self.at + 1)
            elif ready:
                self.playing = False
        self._say()

    async def _show(self, step: int) -> None:
        self.at = step
        taken = [(stage, stage.drawing.steps) for stage in self._stages if stage.drawing is not None]
        await asyncio.gather(*(stage.show(min(step, steps)) for stage, steps in taken if steps))
        self._say()

    def _say(self) -> None:
        icon, label = ("pause", "pause") if self.playing else ("play_arrow", "play")
        if self._play.props.get("icon") != icon:
            self._play.props(f"icon={icon} aria-label={label}")
        if self._slider.props.get("max") != max(2, self._steps):
            self._slider.props["max"] = max(2, self._steps)
            self._slider.update()
        if self.at and self._slider.value != self.at:
            self._slider.value = self.at
        self._now.text = self._told()

    def _told(self) -> str:
        drawings = self._drawings
        if failed := next((drawing for drawing in drawings if drawing.state == "failed"), None):
            return failed.error or "failed"
        if not drawings:
            return ""
        if not self.at:
            return "waits for its first step"
        over = all(drawing.is_over for drawing in drawings)
        parts = [f"step {self.at} of {self._steps}{'' if over else ' so far'}"]
        if len(drawings) == 1 and drawings[0].steps >= self.at:
            moment = drawings[0].recording.moments[self.at - 1]
            parts += [
                f"t {moment.t.mean():.2f}",
                f"entropy {moment.entropy.mean():.3f}",
                f"kept {moment.share('kept'):.0%}",
                f"erased {moment.share('erased'):.0%}",
            ]
        return " · ".join(part.replace(" ", "\u00a0") for part in parts)


def key(*, given: bool = False) -> None:
    """What the colors of the states mean.

    Args:
        given: whether some tokens are not drawn.
    """
    with ui.element("div").classes("studio-row studio-soft"):
        for state, meaning in MEANINGS.items():
            with ui.element("span").classes("studio-key"):
                ui.element("i").style(f"background: {COLOURS[state]}")
                ui.label(meaning)
        if given:
            with ui.element("span").classes("studio-key"):
                ui.element("i").style("background: #606060")
                ui.label("given: not drawn")


def marked(name: str, part: str) -> str:
    """The marker of a part of one of several stages, for tests."""
    return f"{name}-{part}" if name else part
