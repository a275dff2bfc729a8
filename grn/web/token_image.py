"""A picture whose tokens can be painted or picked."""

from collections.abc import Callable, Sequence
from typing import Any

from nicegui.element import Element

from grn.web.views import Layout


class TokenImage(Element, component="token_image.js"):
    """
    Args:
        label: what it shows, for those who do not see it.
        on_stroke: called with the cells of a stroke (`Layout.place`) and whether they are to be erased.
        on_pick: called with a cell.
    """

    def __init__(
        self,
        label: str,
        *,
        on_stroke: Callable[[Sequence[int], bool], Any] | None = None,
        on_pick: Callable[[int], Any] | None = None,
    ) -> None:
        super().__init__()
        self._props |= {"label": label, "source": "", "mode": "inspect", "brush": 1, "painted": [], "selected": None}
        self._props |= {"columns": 1, "rows": 1, "width": 8, "height": 8}
        if on_stroke is not None:
            self.on("stroke", lambda it: on_stroke(_cells(it.args["cells"]), bool(it.args["erase"])))
        if on_pick is not None:
            self.on("pick", lambda it: on_pick(_cells([it.args["cell"]])[0]))

    def show(self, source: str | None = None, *, layout: Layout | None = None, **props: Any) -> None:
        """Sets the picture (a data URL), its layout, or others of the component's properties."""
        if source is not None:
            props["source"] = source
        if layout is not None:
            props |= {name: getattr(layout, name) for name in ("columns", "rows", "width", "height")}
        if any(self._props.get(name) != value for name, value in props.items()):
            self._props |= props
            self.update()


def _cells(values: Any) -> list[int]:
    """What a browser says is not trusted."""
    return [int(value) for value in values][: 2**20]
