"""A/B: the same request by two settings, or two checkpoints, side by side and in step."""

from dataclasses import replace

from nicegui import ui

from grn.web.controls import sampler_controls, what_controls
from grn.web.models import Model, refiners
from grn.web.session import Session, complain
from grn.web.settings import Settings
from grn.web.stage import Player, Stage, key


def compare_tab(session: Session) -> None:
    """Fills the tab."""
    common = Settings.of(session.model)
    with ui.element("div").classes("studio-columns"):
        with ui.element("div").classes("studio-controls"):

            @ui.refreshable
            def controls() -> None:
                what_controls(session, common)

            controls()
            button = ui.button("Draw both", icon="compare").props("unelevated no-caps data-testid=draw-both")
            button.classes("w-full")
            ui.label("Both have the same noise: seed and sample decide on it.").classes("studio-soft")
        with ui.element("div").classes("studio-stage"):
            with ui.element("div").classes("studio-sides"):
                sides = [_Side(session, name) for name in "AB"]
            player = Player(session, [side.stage for side in sides], name="compare")
            key()

    async def draw() -> None:
        engine = session.studio.engine
        for drawing in session.others:
            engine.cancel(drawing)
        session.others = []
        for side in sides:
            drawing = await session.draw(side.settings_of(common), side.model)
            if drawing is None:
                return
            session.others.append(drawing)
            side.stage.watch(drawing)
        player.play(at=0)

    def opened() -> None:
        vars(common).update(vars(Settings.of(session.model)))
        controls.refresh()
        for side in sides:
            side.follow()

    button.on_click(draw)
    session.on_model.append(opened)


class _Side:
    """A checkpoint, how it samples, and its pictures."""

    def __init__(self, session: Session, name: str) -> None:
        self._session, self._name = session, name
        self.model: Model = session.model
        self.settings = Settings.of(self.model)
        with ui.element("div").classes("studio-side"):
            with ui.element("div").classes("studio-row"):
                ui.label(name).classes("studio-heading")
                self._ckpt = ui.select(self._known(), value=session.model.ckpt, label="checkpoint")
                self._ckpt.props(f"dense outlined options-dense data-testid={name}-checkpoint").classes("grow")
                self._ckpt.on_value_change(self._open).on("popup-show", lambda: self._ckpt.set_options(self._known()))
            self._controls = ui.refreshable(lambda: sampler_controls(self.model, self.settings, name=name))
            self._controls()
            self.stage = Stage(session, panels=("predicted", "states"), name=name)

    def settings_of(self, common: Settings) -> Settings:
        """What is common, sampled as this side has it."""
        names = ("kind", "steps", "guidance", "interval", "temperature", "update", "kappa")
        own = {name: getattr(self.settings, name) for name in names}
        return replace(common, **own)

    def follow(self) -> None:
        """After another checkpoint was opened in this window."""
        self._ckpt.set_options(self._known(), value=self._session.model.ckpt)

    def _known(self) -> dict[str, str]:
        session = self._session
        found = {str(run.folder): run.name for run in refiners(session.studio.runs)}
        return {session.model.ckpt: session.model.name, self.model.ckpt: self.model.name} | found

    async def _open(self) -> None:
        session, ckpt = self._session, self._ckpt.value
        if ckpt == self.model.ckpt:
            return
        try:
            model = await session.work(lambda: session.studio.models.open(ckpt))
        except Exception as error:
            complain(error)
            self._ckpt.set_value(self.model.ckpt)
            return
        if (model.text is None) != (session.model.text is None):
            complain(f"{model.name} and {session.model.name} are of classes and of texts: they draw nothing in common")
            self._ckpt.set_value(self.model.ckpt)
            return
        self.model, self.settings = model, Settings.of(model)
        self._controls.refresh()
