"""Lines and bars with the 95 % intervals over seeds, and the loss on a plane of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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


def plane(axes: Axes, found: dict[str, Any]) -> None:
    """The loss on a plane of weights: what ``Landscape.plane`` gives, and the losses of states and merge."""
    axis, grid = found["axis"], np.array(found["grid"])
    levels = np.quantile(grid, np.linspace(0, 1, 15))
    filled = axes.contourf(axis, axis, grid, levels=levels, cmap="viridis_r")
    axes.figure.colorbar(filled, ax=axes, label="loss (nats per byte)", format="%.2f")
    for number, ((x, y), loss) in enumerate(zip(found["places"], found["losses"], strict=True), 1):
        axes.plot(x, y, "o", color="white", markeredgecolor="black")
        axes.annotate(f"θ{number} {loss:.3f}", (x, y), (6, 6), textcoords="offset points")
    axes.plot(0, 0, "*", color="red", markersize=14)
    axes.annotate(f"merge {found['merge']:.3f}", (0, 0), (8, 4), textcoords="offset points", color="red")
    axes.set(xlabel="distance along the line from θ1 to θ2", ylabel="distance across it", box_aspect=1)


def _intervals(cells: Cells) -> tuple[list[float], list[float]]:
    found = [interval(values) for values in cells]
    return [f.mean for f in found], [f.half if math.isfinite(f.half) else 0.0 for f in found]
