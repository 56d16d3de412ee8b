"""How the pictures of the claims draw a line with its interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from benchmarks.papers.verdict import interval


def band(axis: Axes, x: Sequence[float], values: Sequence[Sequence[float]], **style: Any) -> None:
    """Draws the mean over seeds as a line, and its 95 % interval as a band.

    Args:
        axis: to draw on.
        x: the places.
        values: one number per seed at each place.
        style: of the line.
    """
    found = [interval(each) for each in values]
    (line,) = axis.plot(x, [each.mean for each in found], **style)
    if all(math.isfinite(each.half) for each in found):
        low, high = ([each.mean + sign * each.half for each in found] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
