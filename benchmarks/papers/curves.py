"""How the pictures of the claims draw means with their intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from benchmarks.papers.verdict import Interval, interval


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


def points(axis: Axes, intervals: Sequence[Interval], **style: Any) -> None:
    """Draws means and their intervals from left to right, one below the other, at 0, 1, 2, …"""
    halves = [each.half if math.isfinite(each.half) else 0.0 for each in intervals]
    axis.errorbar([each.mean for each in intervals], range(len(intervals)), xerr=halves, capsize=3, **style)
