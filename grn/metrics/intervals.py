"""Confidence intervals (95 %) of metrics, as half their widths."""

import math
from collections.abc import Sequence

Z = 1.959964  # of the normal distribution


def of_share(right: int, count: int) -> float:
    """Of `right` among `count` independent trials, by Wilson's score interval, which holds near 0 and 1, too."""
    share = right / count
    return Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))


def of_mean(values: Sequence[float]) -> float | None:
    """Of the mean of independent values, by their standard error; None of fewer than two."""
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Z * math.sqrt(variance / count)
