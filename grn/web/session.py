"""What all tabs of a browser's window share: the open model, the drawing that is shown, and how to ask for another."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from nicegui import ui

from grn.web.engine import Drawing, Engine, said
from grn.web.models import Model, Models
from grn.web.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True)
class Studio:
    """Of the whole server. runs: `paths.runs`."""

    engine: Engine
    models: Models
    runs: str
    first: Model  # that new windows open


async def _no_tab(ckpt: str) -> None: ...


@dataclass
class Session:
    """One browser window. `settings` are what Live's controls say; `drawing` is what Live and Gallery show, `others`
    are those of A/B.

    A tab that wants to follow appends to `on_model` (called with no arguments after another model was opened) or
    `on_drawing` (after another drawing was begun). `show_tab` and `shown_tab` are the page's; `open_tokenizer`, which
    takes the folder of a run that trains one, is the tokenizer tab's.
    """

    studio: Studio
    model: Model
    settings: Settings
    drawing: Drawing | None = None
    others: list[Drawing] = field(default_factory=list)
    on_model: list[Callable[[], object]] = field(default_factory=list)
    on_drawing: list[Callable[[], object]] = field(default_factory=list)
    show_tab: Callable[[str], object] = lambda name: None
    shown_tab: Callable[[], str] = lambda: ""
    open_tokenizer: Callable[[str], Awaitable[None]] = _no_tab
    focus: Callable[[int], None] = lambda sample: None  # shows a sample alone in Live

    async def work(self, what: Callable[[], T]) -> T:
        """What `what` returns, called on the engine's thread between two steps of drawings."""
        return await asyncio.wrap_future(self.studio.engine.call(what))

    async def open(self, ckpt: str) -> bool:
        """Opens a checkpoint in this window, and tells the tabs; or says what is wrong."""
        try:
            self.model = await self.work(lambda: self.studio.models.open(ckpt))
        except Exception as error:
            complain(error)
            return False
        self.settings = Settings.of(self.model)
        for tell in self.on_model:
            tell()
        return True

    async def draw(self, settings: Settings | None = None, model: Model | None = None) -> Drawing | None:
        """Begins a drawing; None where something is wrong, which is said on the page."""
        settings, model = settings or self.settings, model or self.model
        try:
            request = await self.work(lambda: settings.request(model))
            return self.studio.engine.draw(model.pipeline, request)
        except Exception as error:
            complain(error)
            return None

    def show(self, drawing: Drawing) -> None:
        """Makes it the one that Live and Gallery show; the one before is given up."""
        if self.drawing is not None and self.drawing is not drawing:
            self.studio.engine.cancel(self.drawing)
        self.drawing = drawing
        for tell in self.on_drawing:
            tell()

    def close(self) -> None:
        """When the window is gone."""
        for drawing in (self.drawing, *self.others):
            if drawing is not None:
                self.studio.engine.cancel(drawing)


def complain(error: BaseException | str) -> None:
    """Says on the page, in one line, what is wrong."""
    text = error if isinstance(error, str) else said(error)
    ui.notify(text, type="negative", multi_line=True, timeout=8000, close_button="close", position="bottom")
