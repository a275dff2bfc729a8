"""Gallery: the samples of the drawing that Live shows, from the easiest to the most difficult, with their steps."""

from functools import partial

from nicegui import ui

from grn.web.engine import Drawing
from grn.web.session import Session
from grn.web.settings import MAX_SAMPLES
from grn.web.views import Views, by_difficulty, url


def gallery_tab(session: Session) -> None:
    """Fills the tab."""
    shown: list[Drawing | None] = [None]
    with ui.element("div").classes("studio-row"):
        text = ui.label().classes("studio-soft").props("data-testid=gallery-text")
        ui.space()
        more = ui.button("Draw more of each", icon="grid_view").props("unelevated no-caps data-testid=draw-gallery")
    tiles = ui.element("div").classes("studio-gallery").props("data-testid=gallery")

    def say() -> None:
        drawing = session.drawing
        if drawing is None:
            text.text = "nothing is drawn yet"
        elif drawing.refined is None:
            text.text = f"step {drawing.steps}: sorted when all {drawing.request.num} samples are done"
        else:
            adaptive = drawing.request.sampler.schedule.decide_at is not None
            by = "the entropy that decided on their steps" if adaptive else "the mean entropy of their steps"
            text.text = f"{drawing.request.num} samples from easy to hard: H is {by}. A click shows one in Live."

    async def look(sample: int) -> None:
        session.focus(sample)
        session.show_tab("live")

    async def refresh() -> None:
        drawing = session.drawing
        say()
        if drawing is shown[0] or (drawing is not None and drawing.refined is None):
            if drawing is not shown[0]:
                tiles.clear()
                shown[0] = None
            return
        shown[0] = drawing
        tiles.clear()
        if drawing is None:
            return
        images = await session.work(lambda: Views(drawing).pictures())
        with tiles:
            for sample, difficulty, steps in by_difficulty(drawing):
                wanted = drawing.request.wanted
                caption = str(wanted[sample % len(wanted)])
                with ui.element("button").classes("studio-tile").on("click", partial(look, sample)) as tile:
                    tile.props(f"type=button data-testid=tile-{sample}")
                    ui.element("img").props(f'src="{url(images[sample])}" alt="sample {sample + 1}"')
                    ui.label(f"H {difficulty:.2f} · {steps} steps").classes("studio-now studio-small")
                    ui.label(caption).classes("studio-soft studio-cut")

    async def draw() -> None:
        is_text = session.model.text is not None
        count = len(session.settings.prompts.split("\n") if is_text else session.settings.labels)
        session.settings.each = max(1, min(MAX_SAMPLES, 40) // max(1, count))
        drawing = await session.draw()
        if drawing is not None:
            session.show(drawing)

    more.on_click(draw)
    ui.timer(0.5, refresh)
