"""The tab Tokenizer: a picture after 1, 2, ... M rounds of HBQ, its error, and the PSNR of each number of rounds."""

import math
from pathlib import Path

from nicegui import background_tasks, ui
from PIL import Image

from grn.checkpoints.native import load_tokenizer
from grn.media.pictures import single
from grn.networks.tokenizer import HBQTokenizer, for_inference
from grn.runtime.errors import UserError
from grn.sampling.player import data_url
from grn.web.drop import drop_picture
from grn.web.rounds import MAX_SIDE, Reconstruction, error_map, prepare, reconstructions
from grn.web.session import Session, complain

GREY, BLUE, ORANGE = "#808080", "#3a8fc9", "#d55e00"


def tokenizer_tab(session: Session) -> None:
    """Fills the tab."""
    own = f"its own, {MAX_SIDE} pixels a side at most"
    opened: list[HBQTokenizer] = []  # a tokenizer's own checkpoint; else it is the refiner's
    given: list[Image.Image] = []  # the picture that was given last, if any
    made: list[tuple[Reconstruction, str, str]] = []  # with its picture and its error as data URLs

    def tokenizer() -> HBQTokenizer:
        return opened[0] if opened else session.model.pipeline.bundle.tokenizer

    def size() -> tuple[int, int]:
        """Height and width of samples."""
        bundle = session.model.pipeline.bundle
        return tuple(side * bundle.tokenizer.stride for side in bundle.token_shape[2:])

    async def take(image: Image.Image) -> None:
        given[:] = [image]
        await reconstruct()

    def fail(line: str) -> None:
        problem.set_text(line)

    with ui.element("div").classes("studio-columns"):
        with ui.element("div").classes("studio-controls"):
            drop_picture("Drop a picture here, or click", take, fail, testid="tokenizer-upload")
            live = ui.button("Take the picture from Live", icon="photo", on_click=lambda: take_drawn())
            live.props("outline no-caps data-testid=tokenizer-live").classes("w-full")
            resized = ui.select({"own": own}, value="own", label="size", on_change=lambda: reconstruct())
            resized.props("dense outlined data-testid=tokenizer-size").classes("w-full")
            problem = ui.label().classes("text-negative text-sm break-all")
            problem.props('role="alert" data-testid=tokenizer-problem')
            whose = ui.label().classes("studio-soft").props("data-testid=tokenizer-whose")
        with ui.element("div").classes("studio-stage") as results:
            with ui.row().classes("w-full items-center gap-4 flex-nowrap pt-6 pr-3"):
                ui.label("rounds").classes("studio-soft")
                slider = ui.slider(min=1, max=1, step=1, value=1, on_change=lambda: show())
                slider.props('markers snap label-always data-testid=rounds aria-label="rounds"').classes("grow")
            told = ui.label().classes("studio-now").props("data-testid=tokenizer-told")
            with ui.element("div").classes("studio-views"):
                names = ("picture", "reconstruction", "error")
                (original, _), (reconstruction, _), (error, scale) = map(_figure, names)
            chart = ui.echart(_chart_options(), on_point_click=lambda it: slider.set_value(it.data_index + 1))
            chart.classes("w-full h-56").props("data-testid=psnr")
    results.set_visibility(False)

    async def take_drawn() -> None:
        drawing = session.drawing
        if drawing is None or drawing.steps == 0:
            fail("Live shows no picture yet: draw one there")
            return
        tokens = drawing.tokens_after(drawing.steps)[:1]
        fail("")
        await take(single(await session.work(lambda: drawing.pipeline.decode(tokens)[0, -1])))

    async def reconstruct() -> None:
        if not given:
            return
        wanted = image, chosen, used = given[0], resized.value, tokenizer()
        target = size() if chosen == "samples" else None
        try:
            source, found = await session.work(lambda: _reconstruct(used, image, target))
        except UserError as mistake:
            fail(str(mistake))
            return
        if wanted != (given[0], resized.value, tokenizer()):
            return  # something else is asked for meanwhile
        made[:] = found
        original.props(f'src="{source}"')
        points = [[it.rounds, None if math.isinf(it.psnr) else round(it.psnr, 2)] for it, *_ in made]
        chart.options["series"][0]["data"] = points
        most = max(it.error.max().item() for it, *_ in made)
        scale.set_text(f"error (white: {most:.0f} of 255)")
        results.set_visibility(True)
        show()

    def show() -> None:
        if not made:
            return
        now, picture, errors = made[min(int(slider.value or 1), len(made)) - 1]
        reconstruction.props(f'src="{picture}"')
        error.props(f'src="{errors}"')
        _, height, width = now.pixels.shape
        psnr = "an exact copy" if math.isinf(now.psnr) else f"PSNR {now.psnr:.2f} dB"
        told.set_text(
            f"{now.rounds} of {len(made)} rounds · {psnr} · {now.bits:,} bits, "
            f"{now.bits / (height * width):.2f} a pixel · largest error {now.error.max():.0f}"
        )
        chart.options["series"][0]["markLine"]["data"] = [{"xAxis": now.rounds}]
        chart.update()

    async def use(name: str) -> None:
        """Shows the tokenizer that is meant now."""
        rounds, (height, width) = tokenizer().rounds, size()
        whose.set_text(
            f"Tokenizer of {name}. The picture is encoded once, and decoded from the first bits of each channel. The "
            f"decoder was trained on all {rounds} rounds: with fewer, it is given features that it has seldom seen."
        )
        slider.props(f"max={rounds}")
        slider.set_value(rounds)
        resized.set_options({"samples": f"that of samples, {width} x {height}", "own": own}, value="samples")
        await reconstruct()

    async def use_refiner() -> None:
        opened.clear()
        await use(session.model.name)

    async def open_tokenizer(ckpt: str) -> None:
        try:
            loaded, _ = await session.work(lambda: load_tokenizer(ckpt, embed=False, key="ckpt"))
        except UserError as mistake:
            complain(mistake)
            return
        opened[:] = [for_inference(loaded).to(session.model.pipeline.device)]
        await use(Path(ckpt).name)

    session.open_tokenizer = open_tokenizer
    session.on_model.append(lambda: background_tasks.create(use_refiner()))
    ui.timer(0, use_refiner, once=True)


def _reconstruct(
    tokenizer: HBQTokenizer, image: Image.Image, size: tuple[int, int] | None
) -> tuple[str, list[tuple[Reconstruction, str, str]]]:
    """(The picture as it is encoded; of each number of rounds what it is, the picture and its error), as data URLs."""
    pixels = prepare(image, size)
    made = list(reconstructions(tokenizer, pixels))
    most = max(it.error.max().item() for it in made)  # one scale for all, to compare them
    shown = [(it, data_url(single(it.pixels)), data_url(error_map(it.error, most))) for it in made]
    return data_url(single(pixels[:, 0])), shown


def _figure(name: str) -> tuple[ui.element, ui.label]:
    """(A picture, what stands below it)."""
    with ui.element("figure").classes("studio-view m-0"):
        picture = ui.element("img").classes("w-full rounded bg-neutral-500").style("image-rendering: pixelated")
        picture.props(f'alt="{name}" data-testid="tokenizer-{name}"')
        caption = ui.label(name).classes("studio-soft")
    return picture, caption


def _chart_options() -> dict:
    axis = {"axisLabel": {"color": GREY}, "axisLine": {"lineStyle": {"color": GREY}}, "nameTextStyle": {"color": GREY}}
    return {
        "grid": {"left": 4, "right": 16, "top": 36, "bottom": 24, "containLabel": True},
        "tooltip": {"trigger": "axis", "confine": True},
        "animation": False,
        "xAxis": {
            "type": "value", "name": "rounds", "nameLocation": "middle", "nameGap": 26, "minInterval": 1, "min": 1,
            "max": "dataMax", "splitLine": {"show": False}, **axis,
        },
        "yAxis": {
            "type": "value", "name": "PSNR, dB", "scale": True,
            "splitLine": {"lineStyle": {"color": GREY, "opacity": 0.25}}, **axis,
        },
        "series": [
            {
                "type": "line", "name": "PSNR", "data": [], "symbolSize": 9, "lineStyle": {"width": 2},
                "itemStyle": {"color": BLUE},
                "markLine": {
                    "symbol": "none", "silent": True, "data": [], "label": {"show": False},
                    "lineStyle": {"color": ORANGE, "type": "solid", "width": 2},
                },
            }
        ],
    }  # fmt: skip
