"""What is to be drawn, and how: the controls that fill `Settings`."""

from collections.abc import Callable

from nicegui import events, ui

from grn.method.psi import UPDATES
from grn.sampling.text_bundle import TextRefinerBundle
from grn.web import uploads
from grn.web.models import Model
from grn.web.session import Session, complain
from grn.web.settings import Settings, kinds, sizes

BUTTONS = 20  # classes at most that have a button each
FIXED = ("linear", "cosine", "shifted")


def what_controls(session: Session, settings: Settings) -> None:
    """Classes or prompts, size, frames, the number of each, and the seed."""
    if session.model.text is not None:
        _texts(session.model.text, settings)
    else:
        _classes(session.model, settings)
    with ui.element("div").classes("studio-row").style("flex-wrap: nowrap"):
        number = ui.number("of each", min=1, max=64, precision=0).bind_value(
            settings, "each", forward=lambda value: int(value or 1)
        )
        number.props("dense outlined data-testid=each").classes("w-20")
        seed = ui.number("seed", min=0, max=2**53, precision=0).bind_value(
            settings, "seed", forward=lambda value: int(value or 0)
        )
        seed.props("dense outlined data-testid=seed").classes("grow").style("min-width: 0")
        again = ui.button(icon="casino", on_click=lambda: seed.set_value(int(seed.value or 0) + 1))
        again.props("flat round dense aria-label='next seed' data-testid=next-seed").tooltip("the next seed")


def sampler_controls(model: Model, settings: Settings, *, name: str = "") -> None:
    """Schedule, steps, guidance and its interval, temperature, update."""
    mark = f"{name}-" if name else ""
    with ui.element("div").classes("studio-row"):
        kind = ui.select(kinds(model), label="schedule").bind_value(settings, "kind")
        kind.props(f"dense outlined options-dense data-testid={mark}schedule").classes("grow").style("min-width: 140px")
        steps = ui.number("steps", min=1, max=1000, precision=0).bind_value(
            settings, "steps", forward=lambda value: int(value or 1)
        )
        steps.props(f"dense outlined data-testid={mark}steps").classes("w-20")
        steps.bind_enabled_from(kind, "value", lambda value: value in FIXED)
    with ui.element("div").classes("studio-row"):
        for field, label, step in (("guidance", "guidance", 0.25), ("temperature", "temperature", 0.05)):
            number = ui.number(label, min=0.05 if field == "temperature" else 0, step=step, format="%.4g").bind_value(
                settings, field, forward=lambda value: float(1 if value is None else value)
            )
            number.props(f"dense outlined data-testid={mark}{field}").classes("grow").style("width: 100px")
    with ui.element("div").classes("studio-row"):
        update = ui.select(list(UPDATES), label="update").bind_value(settings, "update")
        update.props(f"dense outlined options-dense data-testid={mark}update").classes("grow").style("min-width: 100px")
        kappa = ui.number("kappa", min=0, max=1, step=0.02, format="%.4g").bind_value(
            settings, "kappa", forward=lambda value: float(1 if value is None else value)
        )
        kappa.props(f"dense outlined data-testid={mark}kappa").classes("w-20")
        kappa.bind_enabled_from(update, "value", lambda value: value == "psi")
    with ui.element("div").style("padding: 0 8px; width: 100%"):
        text = ui.label().classes("studio-soft")
        interval = ui.range(min=0, max=1, step=0.01, value={"min": settings.interval[0], "max": settings.interval[1]})
        interval.props(f"data-testid={mark}interval aria-label='guidance interval'")

    def told() -> None:
        chosen = interval.value or {"min": 0, "max": 1}
        settings.interval = (float(chosen["min"]), float(chosen["max"]))
        text.text = "guidance acts at t from {:.2f} to {:.2f}".format(*settings.interval)

    def calibrated() -> None:
        if settings.kind == "calibrated" and model.calibrated is not None:
            found = settings.sampled_as(model.calibrated)
            for name in ("guidance", "temperature", "update", "kappa"):
                setattr(settings, name, getattr(found, name))
            interval.value = {"min": found.interval[0], "max": found.interval[1]}

    interval.on_value_change(told)
    kind.on_value_change(calibrated)
    told()


def start_controls(session: Session, settings: Settings) -> None:
    """A picture to start from, with its strength, and a mask of what is redrawn."""
    is_clip = session.model.text is not None and session.model.text.frames > 1
    what = "clips go on from it" if is_clip else "samples start from it"
    shown = ui.element("div").classes("studio-row")

    def take(field: str) -> Callable[[events.UploadEventArguments], object]:
        async def taken(event: events.UploadEventArguments) -> None:
            if event.file.size() > uploads.MAX_BYTES:
                complain(f"{event.file.name} is too large: at most {uploads.MAX_BYTES // 2**20} MiB")
                return
            try:
                picture = uploads.picture(event.file.name, await event.file.read())
            except Exception as error:
                complain(error)
                return
            setattr(settings, field, picture)
            if field == "image":
                settings.mask = None
            show()

        return taken

    def drop() -> None:
        settings.image = settings.mask = None
        show()

    def show() -> None:
        shown.clear()
        with shown:
            for picture, name in ((settings.image, "picture"), (settings.mask, "mask")):
                if picture is not None:
                    small = picture.copy()
                    small.thumbnail((96, 96))
                    ui.image(small).classes("w-16 rounded").props(f"data-testid=given-{name} alt={name}")
            if settings.image is not None:
                ui.button("remove", on_click=drop).props("flat dense no-caps data-testid=remove-picture")

    for field, text in (("image", f"picture: {what}"), ("mask", "mask: white is redrawn")):
        if field == "mask" and is_clip:
            continue
        upload = ui.upload(
            label=text, auto_upload=True, max_files=None, max_file_size=uploads.MAX_BYTES, on_upload=take(field)
        )
        upload.on("uploaded", upload.reset)  # not before: that would break the answer off
        upload.on("rejected", lambda: complain(f"not taken: pictures of at most {uploads.MAX_BYTES // 2**20} MiB"))
        upload.props(f"flat bordered accept=image/* data-testid=upload-{field}").classes("studio-upload w-full")
    if not is_clip:
        with ui.element("div").style("padding: 0 8px; width: 100%"):
            label = ui.label().classes("studio-soft")
            label.bind_text_from(settings, "strength", lambda value: f"strength {value:.2f} (1: from noise alone)")
            ui.slider(min=0.05, max=1, step=0.05).bind_value(settings, "strength").props(
                "data-testid=strength aria-label=strength"
            )
    show()


def _classes(model: Model, settings: Settings) -> None:
    number = model.pipeline.bundle.num_conditions
    with ui.element("div").classes("studio-row"):
        ui.label("class").classes("studio-heading")
        ui.space()
        every = ui.button("one of each").props("flat dense no-caps data-testid=every-class")
    if number > BUTTONS:
        chosen = ui.input(placeholder=f"0 to {number - 1}, by commas", value=", ".join(map(str, settings.labels)))
        chosen.props("dense outlined data-testid=classes").classes("w-full")

        def read() -> None:
            words = str(chosen.value).replace(",", " ").split()
            settings.labels = [int(word) for word in words if word.isdecimal() and len(word) < 9]

        chosen.on_value_change(read)
        every.on_click(lambda: chosen.set_value(", ".join(map(str, range(min(number, 64))))))
        return
    buttons = {}

    def choose(labels: list[int]) -> None:
        settings.labels = labels
        for label, button in buttons.items():
            button.props(f"{'unelevated' if label in labels else 'outline'}", remove="unelevated outline")
            button.props(f"aria-pressed={str(label in labels).lower()}")

    with ui.element("div").style("display: grid; grid-template-columns: repeat(5, 1fr); gap: 6px; width: 100%"):
        for label in range(number):
            buttons[label] = ui.button(str(label)).props(f"dense no-caps data-testid=class-{label}")
    for label, button in buttons.items():
        # A click chooses one class; with Shift or Ctrl it adds or takes away.
        def clicked(event: events.GenericEventArguments, label: int = label) -> None:
            several = event.args.get("shiftKey") or event.args.get("ctrlKey") or event.args.get("metaKey")
            others = [other for other in settings.labels if other != label]
            choose((others if label in settings.labels else [*others, label]) or [label] if several else [label])

        button.on("click", clicked, ["shiftKey", "ctrlKey", "metaKey"])
    every.on_click(lambda: choose(list(range(number))))
    choose(settings.labels)


def _texts(bundle: TextRefinerBundle, settings: Settings) -> None:
    text = ui.textarea("prompts, a line each").bind_value(settings, "prompts")
    text.props("outlined dense autogrow data-testid=prompts").classes("w-full")
    negative = ui.input("negative prompt").bind_value(settings, "negative_prompt")
    negative.props("outlined dense data-testid=negative-prompt").classes("w-full")
    known = sizes(bundle)
    with ui.element("div").classes("studio-row"):
        size = ui.select({size: f"{size[1]} x {size[0]}" for size in known}, label="size").bind_value(settings, "size")
        size.props("outlined dense options-dense data-testid=size").classes("grow")
        if bundle.tokenizer.temporal_stride > 1:
            frames = ui.number("frames", min=1, step=4, precision=0).bind_value(
                settings, "frames", forward=lambda value: int(value or 1)
            )
            frames.props("outlined dense data-testid=frames").classes("w-24")
