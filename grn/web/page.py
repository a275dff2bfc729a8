"""The page: a header with the open checkpoint, and a tab for each thing that can be done with it."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from nicegui import Client, ui

from grn.web.compare_tab import compare_tab
from grn.web.gallery_tab import gallery_tab
from grn.web.live_tab import live_tab
from grn.web.runs_tab import runs_tab, serve_pictures
from grn.web.session import Session, Studio
from grn.web.settings import Settings
from grn.web.tokenizer_tab import tokenizer_tab

# (Name, what stands on it, icon, what fills it: called with the session within the panel)
TABS: tuple[tuple[str, str, str, Callable[[Session], None]], ...] = (
    ("live", "Live", "blur_on", live_tab),
    ("gallery", "Gallery", "grid_view", gallery_tab),
    ("compare", "A/B", "compare", compare_tab),
    ("tokenizer", "Tokenizer", "data_object", tokenizer_tab),
    ("runs", "Runs", "show_chart", runs_tab),
)
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"><rect width="4" height="4" fill="#303030"/>'
    '<path d="M0 0h2v1H0zM3 1h1v2H3z" fill="#009e73"/><path d="M1 1h2v2H1z" fill="#0072b2"/>'
    '<path d="M0 3h2v1H0z" fill="#d55e00"/></svg>'
)


def add(studio: Studio) -> None:
    """Adds the page to NiceGUI's app."""
    serve_pictures(Path(studio.runs).expanduser())

    @ui.page("/")
    def root(client: Client) -> None:
        session = Session(studio, studio.first, Settings.of(studio.first))
        client.on_delete(session.close)
        _build(session)


def _build(session: Session) -> None:
    ui.add_css(files("grn.web").joinpath("page.css").read_text(encoding="utf-8"))
    ui.colors(primary="#0072b2", secondary="#009e73", accent="#d55e00", negative="#b3261e", positive="#1b7a4b")
    dark = ui.dark_mode(None)
    with ui.header(elevated=False).classes("studio-header"):
        ui.html(ICON, sanitize=False).classes("studio-icon")
        ui.label("GRN studio").classes("studio-name")
        model = ui.label().classes("studio-model").mark("model").props("data-testid=model")
        ui.space()
        button = ui.button(icon="dark_mode").props("flat round dense color=inherit data-testid=dark")
        button.tooltip("light, dark, or as the system has it")

        def turn() -> None:
            dark.value = {None: True, True: False, False: None}[dark.value]
            button.props(f"icon={ {None: 'brightness_auto', True: 'dark_mode', False: 'light_mode'}[dark.value] }")

        button.props("icon=brightness_auto").on_click(turn)
    with ui.tabs().classes("studio-tabs").props("dense inline-label no-caps align=left") as tabs:
        for name, text, icon, _ in TABS:
            ui.tab(name, label=text, icon=icon).props(f"data-testid=tab-{name}")
    with ui.tab_panels(tabs, value=TABS[0][0], animated=False, keep_alive=True).classes("studio-panels"):
        for name, _, _, fill in TABS:
            with ui.tab_panel(name).classes("studio-panel").props(f"data-testid=panel-{name}"):
                fill(session)
    session.show_tab, session.shown_tab = tabs.set_value, lambda: str(tabs.value)

    def named() -> None:
        model.text = session.model.name
        model.tooltip(f"{session.model.ckpt}: {session.model.pipeline!r}")

    session.on_model.append(named)
    named()
