"""The judge of critters in motion: a network that reads whole clips, trained on real ones alone."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from grn.toys.critters import ATTRIBUTES
from grn.toys.critters_judge import UNTOLD, CrittersJudge
from grn.toys.critters_video import FRAMES, MOTIONS

TOO_SMALL = ("eyes", "mouth", "hat")  # of 48x48 pixels: on real clips it reads them too seldom


class MovingCrittersJudge(CrittersJudge):
    """Reads color, shape, background and motion of clips as of data=critters_video; otherwise like `CrittersJudge`.

    `compute` gives `attribute_accuracy`, of each `<attribute>_accuracy` (`motion_accuracy`), `critters_fid`,
    `critters_fid_val` and `judge_val_accuracy`.
    """

    reads_clips: ClassVar = True
    attributes: ClassVar[Mapping[str, Sequence[str]]] = {**ATTRIBUTES, "motion": MOTIONS}
    shape: ClassVar[tuple[int, ...]] = (3, FRAMES, 48, 48)
    data: ClassVar = "critters_video"
    epochs: ClassVar = 12

    @classmethod
    def read(cls, caption: str) -> list[int]:
        """As of `CrittersJudge`, without what is too small."""
        told = zip(ATTRIBUTES, super().read(caption))
        motion = (place for place, motion in enumerate(MOTIONS) if motion in caption.lower())
        return [*(UNTOLD if name in TOO_SMALL else value for name, value in told), next(motion, UNTOLD)]

    def _shares(self) -> dict[str, list[float]]:
        # Pairs of color and hat are not told apart here.
        return {name: shares for name, shares in super()._shares().items() if not name.endswith("_seen")}
