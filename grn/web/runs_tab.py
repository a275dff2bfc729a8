"""The tab Runs: every run folder with its curves, scores and newest pictures, read anew while it is looked at."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlencode

from fastapi import HTTPException
from fastapi.responses import FileResponse
from nicegui import app, ui
from nicegui.run import io_bound

from grn.runs.listing import Run, find_runs, newest_pictures, read_curves
from grn.web.session import Session

PERIOD = 2.0  # seconds from one reading to the next
# What is drawn first, of the curves that a run has.
FIRST = ("train/loss", "val/loss", "val/psnr", "eval/fid", "eval/judge_accuracy", "val/accuracy", "train/lr")
SHOWN = 4
GREY, BLUE = "#808080", "#3a8fc9"  # to be read on light and dark ground
URL = "/grn/runs/picture"


def serve_pictures(runs: Path) -> None:
    """Lets the page load the newest pictures of run folders, and no other file. Once for a server."""

    @app.get(URL, include_in_schema=False)
    def picture(name: str, file: str) -> FileResponse:
        folder = runs / name
        known = any(folder == it.folder for it in find_runs(runs)) if ".." not in folder.parts else False
        path = folder / file
        if not known or path not in newest_pictures(folder).values():
            raise HTTPException(404)
        return FileResponse(path, headers={"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"})


def runs_tab(session: Session) -> None:
    """Fills the tab."""
    runs = Path(session.studio.runs).expanduser()
    known: dict[str, Run] = {}
    entries: dict[str, Entry] = {}
    shown: list[Details] = []  # one at most
    due = 0.0  # when to read again, by `time.monotonic`

    with ui.element("div").classes("studio-columns"):
        with ui.element("div").classes("studio-controls"):
            search = ui.input(placeholder="filter", on_change=lambda: draw_list()).classes("w-full")
            search.props("dense outlined clearable data-testid=filter")
            listing = ui.column().classes("w-full gap-1").props('role="list" data-testid=runs')
        details = ui.element("div").classes("studio-stage").props("data-testid=run-details")
    search.set_visibility(False)

    async def open_run(run: Run) -> None:
        if run.kind == "tokenizer":
            await session.open_tokenizer(str(run.folder))
            session.show_tab("tokenizer")
        elif await session.open(str(run.folder)):
            session.show_tab("live")

    async def select(name: str) -> None:
        details.clear()
        shown.clear()
        for entry in entries.values():
            entry.mark(entry.name == name)
        if name in known:
            with details:
                shown.append(Details(known[name], lambda: open_run(known[name])))
            await shown[0].refresh(known[name])

    def draw_list() -> None:
        """Anew; `refresh` changes what is there otherwise, so that nobody loses the place where they are."""
        listing.clear()
        entries.clear()
        wanted = (search.value or "").lower()
        with listing:
            if not known:
                ui.label(f"No runs in {runs}").classes("text-lg break-all")
                ui.label("python -m grn.train +experiment=digits_c2i trains one").classes("studio-soft")
            for each in known.values():
                if wanted in each.name.lower():
                    entries[each.name] = Entry(each, select)
                    entries[each.name].mark(bool(shown) and shown[0].run.name == each.name)

    async def look() -> None:
        """Reads as soon as the tab is shown, and then every `PERIOD`."""
        nonlocal due
        if session.shown_tab() != "runs":
            due = 0.0
        elif time.monotonic() >= due:
            due = math.inf  # while it is being read
            try:
                await refresh()
            finally:
                due = time.monotonic() + PERIOD

    async def refresh() -> None:
        found = {it.name: it for it in await io_bound(find_runs, runs) or []}
        # Of runs that train at the same time, now one and now the other is the newest: they keep their places.
        order = [*(name for name in found if name not in known), *(name for name in known if name in found)]
        is_new = order != list(known) or not listing.default_slot.children
        known.clear()
        known.update((name, found[name]) for name in order)
        search.set_visibility(len(known) > 8)
        if is_new:
            draw_list()
        for name, entry in entries.items():
            entry.refresh(known[name])
        if not shown or shown[0].run.name not in known:
            await select(next(iter(known), ""))
        else:
            await shown[0].refresh(known[shown[0].run.name])

    ui.timer(0.2, look)


class Entry:
    """A run in the list."""

    def __init__(self, run: Run, on_click: Callable[[str], object]):
        self.name = run.name
        self._line = ui.column().classes("w-full gap-0 px-3 py-2 rounded cursor-pointer hover:bg-gray-500/10")
        self._line.props(f'role="listitem" tabindex=0 data-testid="run" data-run="{_attribute(run.name)}"')
        for event in ("click", "keydown.enter"):
            self._line.on(event, lambda: on_click(run.name))
        with self._line:
            with ui.row().classes("w-full items-center justify-between gap-2 flex-nowrap"):
                ui.label(run.name).classes("font-medium break-all")
                self._running = ui.badge("running", color="positive").props("data-testid=running")
            with ui.row().classes("w-full justify-between gap-2 studio-soft flex-nowrap"):
                self._told = ui.label()
                self._ago = ui.label().classes("whitespace-nowrap")
        self.refresh(run)

    def refresh(self, run: Run) -> None:
        self._running.set_visibility(run.is_running)
        self._told.set_text(f"{run.kind or 'unknown kind'} · {steps_of(run)}")
        self._ago.set_text(ago(run.updated))

    def mark(self, is_selected: bool) -> None:
        self._line.classes(add="studio-chosen" if is_selected else "", remove="" if is_selected else "studio-chosen")
        self._line.props(f"aria-current={'true' if is_selected else 'false'}")


class Details:
    """What one run has; `refresh` shows what has changed, and leaves the rest as it is."""

    def __init__(self, run: Run, on_open: Callable[[], object]):
        self.run = run
        self._pictures: dict[str, tuple[Path, float]] = {}
        self._charts: dict[str, ui.echart] = {}
        self._curves: Mapping[str, Sequence[tuple[int, float]]] = {}
        with ui.row().classes("w-full items-center justify-between gap-2"):
            with ui.column().classes("gap-0 min-w-0"):
                ui.label(run.name).classes("text-xl font-medium break-all")
                self._told = ui.label().classes("studio-soft").props("data-testid=run-told")
            self._open = ui.button("Open in studio", icon="open_in_new", on_click=on_open)
            self._open.props("unelevated no-caps data-testid=open-run")
        self._progress = ui.linear_progress(0, show_value=False, size="4px").props("instant-feedback")
        self._problems = ui.column().classes("gap-1")
        self._told_problems: list[str] = []
        with ui.row().classes("w-full items-center gap-4"):
            self._choice = ui.select([], multiple=True, label="curves", on_change=self._draw_charts)
            self._choice.props("use-chips dense outlined options-dense data-testid=curves").classes("grow min-w-0")
            self._log = ui.switch("log scale", on_change=self._draw_charts)
        self._grid = ui.element("div").classes("w-full grid gap-4 xl:grid-cols-2")
        self._gallery = ui.element("div").classes("w-full grid gap-4 sm:grid-cols-2").props("data-testid=run-pictures")
        self._scores = ui.expansion("Scores", value=True).classes("w-full").props("dense data-testid=scores")

    async def refresh(self, now: Run) -> None:
        """Reads curves and pictures in another thread and shows them."""
        curves, pictures = await io_bound(read_curves, now.folder), await io_bound(_dated, now.folder)
        if curves is None or pictures is None or self._told.is_deleted:  # closed, or another run was chosen meanwhile
            return
        state = f"running: {now.writer}" if now.is_running else f"last written {ago(now.updated)}"
        self._told.set_text(" · ".join(filter(None, [now.kind or "unknown kind", steps_of(now), state])))
        self._open.set_enabled(now.checkpoint is not None and now.kind is not None)
        share = now.step / now.max_steps if now.step is not None and now.max_steps else 0
        self._progress.set_value(min(1.0, share))
        self._progress.set_visibility(now.is_running)
        self._show_problems(now.problems)
        self._show_scores(now.scores)
        if curves != self._curves:
            self._curves = curves
            names = list(curves)
            if names != self._choice.options:
                kept = [name for name in self._choice.value or [] if name in curves]
                self._choice.set_options(names, value=kept or first_curves(curves))
            self._draw_charts()
        if pictures != self._pictures:
            self._pictures = pictures
            self._draw_pictures()
        self.run = now

    def _draw_charts(self) -> None:
        chosen = list(self._choice.value or [])
        if list(self._charts) != chosen:
            self._grid.clear()
            self._charts = {}
            with self._grid:
                for name in chosen:
                    self._charts[name] = ui.echart(chart_options(name)).classes("w-full h-48")
                    self._charts[name].props(f'data-testid="chart" data-curve="{_attribute(name)}"')
        for name, chart in self._charts.items():
            points = self._curves.get(name, [])
            is_log = bool(self._log.value) and all(value > 0 for _, value in points)
            chart.options["yAxis"]["type"] = "log" if is_log else "value"
            chart.options["series"][0]["data"] = [list(point) for point in points]
            chart.options["series"][0]["showSymbol"] = len(points) < 30
            chart.update()

    def _show_problems(self, problems: Sequence[str]) -> None:
        if list(problems) != self._told_problems:
            self._told_problems = list(problems)
            self._problems.clear()
            with self._problems:
                for problem in problems:
                    ui.label(problem).classes("text-sm text-warning break-all")

    def _show_scores(self, scores: Mapping[str, float]) -> None:
        if scores == self.run.scores and self._scores.default_slot.children:
            return
        self._scores.clear()
        self._scores.set_visibility(bool(scores))
        with self._scores, ui.element("div").classes("w-full grid gap-x-8 sm:grid-cols-2 xl:grid-cols-3"):
            for name, value in scores.items():
                with ui.row().classes("justify-between flex-nowrap gap-4 text-sm py-0.5 border-b border-gray-500/20"):
                    ui.label(name).classes("opacity-70 break-all")
                    ui.label(f"{value:.6g}").classes("tabular-nums whitespace-nowrap")

    def _draw_pictures(self) -> None:
        self._gallery.clear()
        with self._gallery:
            for kind, (path, changed) in self._pictures.items():
                asked = {"name": self.run.name, "file": str(path.relative_to(self.run.folder)), "changed": changed}
                with ui.element("figure").classes("m-0 min-w-0"):
                    if path.suffix.lower() == ".mp4":
                        ui.video(f"{URL}?{urlencode(asked)}", autoplay=True, muted=True, loop=True).classes("w-full")
                    else:
                        picture = ui.element("img").classes("w-full rounded").style("image-rendering: pixelated")
                        picture.props(f'src="{URL}?{urlencode(asked)}" alt="{_attribute(kind)}" loading=lazy')
                    ui.label(str(path.relative_to(self.run.folder))).classes("studio-soft break-all pt-1")


def _dated(folder: Path) -> dict[str, tuple[Path, float]]:
    dated = {}
    for kind, path in newest_pictures(folder).items():
        try:
            dated[kind] = (path, path.stat().st_mtime)
        except OSError:  # removed meanwhile
            continue
    return dated


def first_curves(curves: Mapping[str, Sequence]) -> list[str]:
    """Names of curves of more than a point: those of `FIRST` that are there, and else any; `SHOWN` at most."""
    lines = [name for name, points in curves.items() if len(points) > 1] or list(curves)
    return ([name for name in FIRST if name in lines] or lines)[:SHOWN]


def chart_options(name: str) -> dict:
    """An ECharts chart of one curve by steps, without points."""
    axis = {"axisLabel": {"color": GREY}, "axisLine": {"lineStyle": {"color": GREY}}}
    faint = {"splitLine": {"lineStyle": {"color": GREY, "opacity": 0.25}}}
    return {
        "title": {"text": name, "left": 0, "textStyle": {"fontSize": 13, "fontWeight": 500, "color": GREY}},
        "grid": {"left": 4, "right": 16, "top": 44, "bottom": 4, "containLabel": True},
        "tooltip": {"trigger": "axis", "confine": True},
        "animation": False,
        "xAxis": {"type": "value", "min": 0, "max": "dataMax", "splitLine": {"show": False}, **axis},
        "yAxis": {"type": "value", "scale": True, **axis, **faint},
        "series": [{"type": "line", "name": name, "data": [], "lineStyle": {"width": 2}, "itemStyle": {"color": BLUE}}],
    }


def steps_of(run: Run) -> str:
    if run.step is None:
        return "no step yet"
    return f"step {run.step:,}" + (f" of {run.max_steps:,}" if run.max_steps else "")


def ago(then: float, now: float | None = None) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(0, int((time.time() if now is None else now) - then))
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return "now" if seconds < 10 else f"{seconds} s ago"


def _attribute(text: str) -> str:
    """For a quoted value of NiceGUI's `props`."""
    return text.replace("\\", "/").replace('"', "'").replace("\n", " ")
