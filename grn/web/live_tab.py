"""Live: a drawing step by step, with its tools: erase and refine on, inspect, and what draws it again."""

from nicegui import ui

from grn.web.controls import sampler_controls, start_controls, what_controls
from grn.web.keeping import keeping
from grn.web.session import Session
from grn.web.stage import Player, Stage, key
from grn.web.views import COLOURS, curves, history

BRUSHES = {0: "1 token", 1: "3 x 3", 2: "5 x 5"}
GREY = "#858a90"  # on light and on dark ground
AXIS = {
    "type": "value",
    "axisLabel": {"color": GREY},
    "axisLine": {"lineStyle": {"color": GREY}},
    "splitLine": {"lineStyle": {"color": "rgba(128, 128, 128, 0.25)"}},
}
LINES = {"entropy": "#cc79a7", "kept": COLOURS["kept"], "erased": COLOURS["erased"], "drawn": COLOURS["filled"]}


def live_tab(session: Session) -> None:
    """Fills the tab."""
    with ui.element("div").classes("studio-columns"):
        with ui.element("div").classes("studio-controls"):

            @ui.refreshable
            def controls() -> None:
                what_controls(session, session.settings)
                sampler_controls(session.model, session.settings)
                with (
                    ui.expansion("start from a picture", icon="image")
                    .classes("w-full")
                    .props("dense data-testid=start")
                ):
                    start_controls(session, session.settings)

            controls()
            session.on_model.append(controls.refresh)

            async def draw() -> None:
                drawing = await session.draw()
                if drawing is not None:
                    session.show(drawing)

            ui.button("Draw", icon="brush", on_click=draw).props("unelevated no-caps data-testid=draw").classes(
                "w-full"
            )
        with ui.element("div").classes("studio-stage"):
            stage = Stage(session)
            player = Player(session, [stage])
            tools = _Tools(session, stage, player)
            colours = ui.refreshable(lambda: key(given=stage.is_masked))
            colours()
            chart = _Curves(stage)
            with ui.element("div").classes("studio-card"):
                inspector = _Inspector(stage)
            with ui.element("div").classes("studio-card"):
                keep = keeping(session, stage)

    def follow() -> None:
        if session.drawing is not None:
            stage.watch(session.drawing)
        player.play(at=0)
        inspector.forget()
        tools.refresh()
        colours.refresh()
        keep()

    session.on_drawing.append(follow)
    session.focus = tools.focus
    stage.on_step += [chart.refresh, inspector.refresh, keep]
    stage.on_pick = inspector.pick


class _Tools:
    """Inspect or erase, the brush, and refining on; which sample and which frame is shown."""

    def __init__(self, session: Session, stage: Stage, player: Player) -> None:
        self._session, self._stage, self._player = session, stage, player
        with ui.element("div").classes("studio-row"):
            self._mode = ui.toggle({"inspect": "Inspect", "erase": "Erase"}, value="inspect")
            self._mode.props("no-caps dense unelevated padding='4px 12px' data-testid=tool").on_value_change(self._tool)
            self._brush = ui.select(BRUSHES, value=1, label="brush").props("dense outlined options-dense")
            self._brush.props("data-testid=brush").classes("w-28").on_value_change(self._tool)
            self._on = ui.button("Refine on", icon="auto_fix_high", on_click=self._refine_on)
            self._on.props("unelevated no-caps dense padding='4px 12px' color=accent data-testid=refine-on")
            self._clear = ui.button("Clear", on_click=stage.clear).props("flat no-caps dense data-testid=clear")
            self._focus = ui.select({-1: "all samples"}, value=-1, label="shown").props("dense outlined options-dense")
            self._focus.classes("w-36").props("data-testid=focus").on_value_change(self._look)
            self._frame = ui.slider(min=0, max=1, value=0).classes("studio-slider").props("data-testid=frame label")
            self._frame.on_value_change(self._look)
            self._through = ui.checkbox("all frames", value=True)
        self._hint = ui.label().classes("studio-soft")
        stage.on_paint.append(self._painted)
        self.refresh()

    def refresh(self) -> None:
        """After another drawing was begun."""
        views = self._stage.views
        number = 1 if views is None else views.drawing.request.num
        self._focus.set_options({-1: "all samples"} | {n: f"sample {n + 1}" for n in range(number)}, value=-1)
        self._focus.set_visibility(number > 1)
        frames = 1 if views is None else views.frames
        self._frame.props(f"max={max(1, frames - 1)}")
        self._frame.set_value(0)
        for element in (self._frame, self._through):
            element.set_visibility(frames > 1)
        self._tool()

    def focus(self, sample: int) -> None:
        """Shows one sample alone."""
        self._focus.set_value(sample)

    def _tool(self) -> None:
        erases = self._mode.value == "erase"
        self._stage.tool(self._mode.value, self._brush.value)
        self._brush.set_visibility(erases)
        self._painted()
        self._hint.text = (
            "Paint over what should be drawn again, on any of the pictures and at any step (Shift takes paint away); "
            "then refine on. On finished samples that is inpainting."
            if erases
            else "Click a position to see what became of its tokens, step by step."
        )

    def _painted(self) -> None:
        shown = self._mode.value == "erase"
        for button in (self._on, self._clear):
            button.set_visibility(shown)
            button.set_enabled(bool(self._stage.painted))

    async def _look(self) -> None:
        if self._stage.drawing is not None:
            focus = None if self._focus.value < 0 else int(self._focus.value)
            await self._stage.look(focus=focus, frame=int(self._frame.value or 0))

    async def _refine_on(self) -> None:
        at, drawing = self._stage.at, await self._stage.refine_on(all_frames=bool(self._through.value))
        if drawing is self._stage.drawing:
            self._player.play(at=at)
        elif drawing is not None:
            self._session.show(drawing)


class _Curves:
    """Entropy, and shares of tokens, by step; a click goes to a step."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._chart = ui.echart(
            {
                "animation": False,
                "textStyle": {"color": GREY},
                "grid": {"left": 36, "right": 16, "top": 34, "bottom": 24},
                "legend": {
                    "top": 0,
                    "left": 0,
                    "itemWidth": 14,
                    "itemHeight": 3,
                    "icon": "rect",
                    "textStyle": {"color": GREY},
                },
                "tooltip": {"trigger": "axis"},
                "xAxis": AXIS | {"min": 1, "max": 2, "minInterval": 1, "splitLine": {"show": False}},
                "yAxis": AXIS | {"min": 0, "max": 1, "interval": 0.5},
                "series": [
                    {
                        "name": name,
                        "type": "line",
                        "showSymbol": False,
                        "data": [],
                        "lineStyle": {"width": 2, "color": colour},
                        "itemStyle": {"color": colour},
                    }
                    for name, colour in LINES.items()
                ],
            }
        )
        self._chart.classes("w-full h-44").props("data-testid=curves")
        self._known: tuple | None = None

    def refresh(self) -> None:
        drawing, at = self._stage.drawing, self._stage.at
        if drawing is None:
            return
        known = (id(drawing), drawing.version, at)
        if known == self._known:
            return
        self._known, options = known, self._chart.options
        found = curves(drawing)
        options["xAxis"]["max"] = max(2, drawing.steps)
        for line in options["series"]:
            values = found[line["name"]]
            line["data"] = [[number, round(value, 4)] for number, value in enumerate(values, 1)]
        options["series"][0]["markLine"] = {
            "silent": True,
            "symbol": "none",
            "label": {"show": False},
            "lineStyle": {"type": "solid", "color": "#8a8f94", "width": 1},
            "data": [{"xAxis": at}],
        }
        self._chart.update()


class _Inspector:
    """What became of one position: values of its tokens by channel and step, colored by state."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._place: tuple[int, int, int] | None = None
        ui.label("Inspect").classes("studio-heading")
        self._text = ui.label("no position is chosen").classes("studio-soft").props("data-testid=inspected")
        self._table = ui.html("", sanitize=False).classes("studio-scroll").props("data-testid=history")

    def forget(self) -> None:
        self._place = None
        self._text.text, self._table.content = "no position is chosen", ""

    def pick(self, cell: int) -> None:
        if self._stage.drawing is None or (place := self._stage.layout.place(cell)) is None:
            return
        self._place = place
        self.refresh()

    def refresh(self) -> None:
        stage = self._stage
        if self._place is None or stage.views is None or not stage.views.drawing.steps:
            return
        sample, row, column = self._place
        stage.select(stage.layout.cell(sample, row, column))
        latent = stage.views.latent(stage.frame)
        visits = history(stage.views.drawing, sample, row, column, latent)
        now = visits[min(stage.at, len(visits)) - 1]
        erased = sum(visit.states.count("erased") for visit in visits[: stage.at])
        self._text.text = (
            f"sample {sample + 1}, row {row + 1}, column {column + 1} · entropy {now.entropy:.2f} nats at step "
            f"{now.step} · {erased} of its tokens erased until then · below: the predicted values, a column a step"
        )
        head = "".join(f"<th style='text-align:center;padding:0'>{visit.step}</th>" for visit in visits)
        rows = [
            f"<tr><th>channel {channel + 1}</th>"
            + "".join(
                f"<td class='{'now' if visit is now else ''}' style='background:{COLOURS[visit.states[channel]]}' "
                f"title='step {visit.step}: {visit.seen[channel]} seen, {visit.predicted[channel]} predicted, "
                f"{visit.states[channel]}'>{visit.predicted[channel]}</td>"
                for visit in visits
            )
            + "</tr>"
            for channel in range(len(now.predicted))
        ]
        entropies = "".join(f"<th style='text-align:center;padding:0'>{visit.entropy:.1f}</th>" for visit in visits)
        self._table.content = (
            f"<table class='studio-history'><tr><th>step</th>{head}</tr>{''.join(rows)}"
            f"<tr><th>entropy</th>{entropies}</tr></table>"
        )
