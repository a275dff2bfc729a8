"""Which few of an evaluation's metrics the console shows."""

import re
from collections.abc import Mapping

ROWS = 5
# The ones that papers report come first, in this order; others follow as they were measured.
FIRST = ("geneval", "fid", "rfid", "fvd", "rfvd", "clip", "judge_accuracy", "pair_accuracy", "motion_accuracy", "psnr")
FIRST += ("ssim", "lpips", "isc_mean", "sfid", "precision", "recall")
# Of a class, a part, a round, an interval: they are in metrics.json.
DETAILS = re.compile(r".*_\d+$|.*_(std|min|max)$|.*(round|decile|quantile|step)s?_?\d+.*|.*/.*_\d+.*")


def headlines(metrics: Mapping[str, float]) -> dict[str, str]:
    """The metrics that matter most, at most `ROWS` of them: name -> value as it is shown."""

    def order(name: str) -> tuple[int, int]:
        leaf = name.rpartition("/")[2]
        return (FIRST.index(leaf) if leaf in FIRST else len(FIRST), list(metrics).index(name))

    def is_detail(name: str) -> bool:
        return bool(DETAILS.fullmatch(name)) or name == "seconds" or name.endswith("_samples")

    chosen = sorted((name for name in metrics if not is_detail(name)), key=order)[:ROWS]
    return {name: _value(name, metrics) for name in chosen}


def _value(name: str, metrics: Mapping[str, float]) -> str:
    value = metrics[name]
    text = str(value) if isinstance(value, int) else f"{value:.4f}"
    count = metrics.get(f"{name}_samples")
    return text if count is None else f"{text} of {int(count)} samples"
