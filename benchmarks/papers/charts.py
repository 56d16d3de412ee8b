"""Lines and bars with the 95 % intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from benchmarks.papers.verdict import interval

Cells = Sequence[Sequence[float]]
"""For each place one number per seed."""


def line(axes: Axes, places: Sequence[float], cells: Cells, label: str, style: str = "-") -> None:
    """A line through the means over seeds."""
    means, halves = _intervals(cells)
    axes.errorbar(places, means, halves, fmt=f"o{style}", capsize=4, label=label)


def bars(axes: Axes, names: Sequence[str], groups: dict[str, Cells]) -> None:
    """At each name a bar for each of the groups."""
    width = 0.8 / len(groups)
    for number, (label, cells) in enumerate(groups.items()):
        places = np.arange(len(names)) + (number - (len(groups) - 1) / 2) * width
        means, halves = _intervals(cells)
        axes.bar(places, means, 0.9 * width, yerr=halves, capsize=4, label=label)
    axes.set_xticks(range(len(names)), names)


def _intervals(cells: Cells) -> tuple[list[float], list[float]]:
    found = [interval(values) for values in cells]
    return [f.mean for f in found], [f.half if math.isfinite(f.half) else 0.0 for f in found]
