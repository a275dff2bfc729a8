"""What draws the shown samples again, and files of them to keep."""

from collections.abc import Callable
from functools import partial

from nicegui import ui

from grn.web import export
from grn.web.engine import Drawing
from grn.web.session import Session, complain
from grn.web.stage import Stage


def keeping(session: Session, stage: Stage) -> Callable[[], None]:
    """Adds the card's content; what it returns refreshes it, and does nothing where nothing has changed."""
    known: list[tuple] = [()]

    @ui.refreshable
    def content() -> None:
        drawing, ckpt = stage.drawing, session.model.ckpt
        with ui.element("div").classes("studio-row"):
            ui.label("Draw it again").classes("studio-heading")
            if drawing is None:
                ui.label("here will stand the command and the Python that draw this again").classes("studio-soft")
                return
            ui.space()
            choice = ui.toggle({"command": "Command", "python": "Python"}, value="command")
            choice.props("no-caps dense unelevated padding='2px 10px' data-testid=language")
        for name, text in (("command", export.command(drawing, ckpt)), ("python", export.snippet(drawing, ckpt))):
            with ui.element("div").classes("studio-copied").bind_visibility_from(choice, "value", value=name):
                ui.label(text).classes("studio-code").props(f"data-testid={name}")
                copy = ui.button(icon="content_copy", on_click=partial(ui.clipboard.write, text))
                copy.props(f"flat round dense size=sm aria-label=copy data-testid=copy-{name}")
                copy.on_click(lambda: ui.notify("copied", type="positive", timeout=1000))
        with ui.element("div").classes("studio-row"):
            for name, text, make in _downloads(session, stage, drawing, ckpt):
                button = ui.button(text, icon="download", on_click=_download(session, name, make))
                button.props(f"outline dense no-caps padding='2px 10px' data-testid=download-{name}")

    def refresh() -> None:
        drawing = stage.drawing
        now = (id(drawing), session.model.ckpt, len(drawing.erasures) if drawing else 0)
        now += tuple(erasure.after for erasure in drawing.erasures) if drawing else ()
        if now != known[0]:
            known[0] = now
            content.refresh()

    content()
    return refresh


def _downloads(
    session: Session, stage: Stage, drawing: Drawing, ckpt: str
) -> list[tuple[str, str, Callable[[], bytes]]]:
    """(File, what stands on the button, what makes it)."""
    found = [
        ("samples.png", "PNG", lambda: export.png(drawing, stage.at)),
        ("refinement.gif", "GIF", lambda: export.gif(drawing)),
        ("samples.mp4", "MP4", lambda: export.mp4(drawing)),
        ("refinement.html", "HTML", lambda: export.page(drawing, ckpt)),
        ("tokens.safetensors", "tokens", lambda: export.tokens(drawing, stage.at)),
    ]
    makers = {"start": export.start, "erasures": export.erasures}
    return found + [(file, file, lambda key=key: makers[key](drawing)) for key, file in export.files(drawing).items()]


def _download(session: Session, name: str, make: Callable[[], bytes]) -> Callable[[], object]:
    async def download() -> None:
        try:
            ui.download.content(await session.work(make), name)
        except Exception as error:
            complain(error)

    return download
