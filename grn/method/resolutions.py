"""Image sizes by aspect ratio and pixel budget, and their rotary spans (docs/method.md#rotary-positions)."""

import math

from grn.runtime.errors import UserError

BUDGETS = ("0.06M", "0.25M", "0.41M", "0.92M", "1M", "2M")
AREA = 225 * 75  # of every template's span of rotary positions: at most 225 rows or columns

_UPRIGHT = {  # height/width: (height, width) in pixels by budget
    3.0: ((448, 144), (880, 288), (1104, 368), (1664, 560), (1776, 592), (2496, 832)),
    2.5: ((400, 160), (816, 320), (1008, 400), (1520, 608), (1616, 640), (2272, 912)),
    2.0: ((368, 176), (720, 368), (912, 448), (1360, 672), (1456, 720), (2032, 1024)),
    1.777: ((336, 192), (688, 384), (848, 480), (1280, 720), (1360, 768), (1920, 1088)),
    1.5: ((320, 208), (624, 416), (784, 528), (1168, 784), (1248, 832), (1760, 1168)),
    1.333: ((288, 224), (592, 448), (736, 560), (1104, 832), (1184, 880), (1664, 1248)),
    1.16: ((272, 240), (544, 480), (688, 592), (1040, 896), (1104, 944), (1552, 1344)),
}
_SQUARE = ((256, 256), (512, 512), (640, 640), (960, 960), (1024, 1024), (1440, 1440))
_LYING = dict(zip(_UPRIGHT, (0.333, 0.4, 0.5, 0.562, 0.666, 0.75, 0.862)))  # an upright template's name on its side

RESOLUTIONS: dict[float, tuple[tuple[int, int], ...]] = {
    **_UPRIGHT,
    1.0: _SQUARE,
    **{
        _LYING[ratio]: tuple((width, height) for height, width in sizes)
        for ratio, sizes in reversed(list(_UPRIGHT.items()))
    },
}
TEMPLATES = tuple(RESOLUTIONS)  # 15 ratios height/width, the tallest first


def nearest_template(height: float, width: float) -> float:
    """The one of `TEMPLATES` nearest to height/width, in pixels or tokens alike."""
    return min(TEMPLATES, key=lambda template: abs(template - height / width))


def resolution(template: float, budget: str, *, key: str = "data.pixels") -> tuple[int, int]:
    """(Height, width) in pixels, multiples of 16, of one of `TEMPLATES` at one of `BUDGETS`.

    Raises:
        UserError: no such budget; the line names `key`.
    """
    if budget not in BUDGETS:
        raise UserError(f"{key}={budget} is not one of {', '.join(BUDGETS)}")
    return RESOLUTIONS[template][BUDGETS.index(budget)]


def resolutions_at(budget: str, *, key: str = "data.pixels") -> dict[float, tuple[int, int]]:
    """Each of `TEMPLATES` with its (height, width) in pixels; arguments and errors as of `resolution`."""
    return {template: resolution(template, budget, key=key) for template in TEMPLATES}


def nearest_budget(height: int, width: int) -> str:
    """The one of `BUDGETS` whose square is nearest in area to height x width, by their ratio."""
    areas = {budget: math.prod(size) for budget, size in zip(BUDGETS, _SQUARE)}
    return min(BUDGETS, key=lambda budget: abs(math.log(areas[budget] / (height * width))))


def rotary_span(template: float) -> tuple[int, int]:
    """(Uh, Uw): how many rotary positions the rows and columns of a template are spread over, whatever the budget."""
    width = math.sqrt(AREA / template)
    return int(template * width), int(width)
