"""Plots the distances: the matrix, the curves along the run, and the curves of every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from merge_callback.analysis.layer_groups import is_layer
from merge_callback.analysis.pairwise import consecutive
from merge_callback.analysis.tables import Source, power_of_ten

WIDTH, HEIGHT, LAYERS_HEIGHT, DPI = 11.0, 4.8, 4.4, 150
"""Inches, and pixels per inch: 1650 by 720 pixels, 1650 by 1380 with the layers."""

_COLORS = ("#0072B2", "#D55E00", "#007A5E", "#8A4F7D", "#444444")
"""After Okabe and Ito, whose palette the colour-blind can tell apart; darkened if it is faint on white."""

_NAMED = 12  # layers that are named in the legend


def draw_distances(
    path: Path,
    sources: Sequence[Source],
    distances: Tensor,
    lags: Sequence[int],
    layers: Mapping[str, Tensor] | None = None,
    functional: Mapping[str, Tensor] | None = None,
) -> None:
    """Draws the matrix next to its curves, below them the curves of the layers and of functional distances.

    Args:
        path: the PNG file.
        sources: the checkpoints of the rows and columns.
        distances: the model's distances, ``(N, N)``.
        lags: the lags of the curves; the layers' curves have the last one.
        layers: the distances ``(N, N)`` of each layer, or ``None``.
        functional: the functional distances ``(N, N)`` by name, or ``None``.
    """
    # A figure with its own canvas, since pyplot would set the caller's global backend.
    heights = (HEIGHT, *[LAYERS_HEIGHT] * (bool(layers) + bool(functional)))
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    matrix, curve = parts[0].subplots(1, 2, width_ratios=(1, 1.25))
    _draw_matrix(matrix, distances)
    _draw_curves(curve, sources, distances, lags)
    if layers:
        _draw_layers(parts[1].subplots(), sources, layers, lags[-1])
    if functional:
        _draw_shares(parts[-1].subplots(), sources, {"RMS of the weights": distances, **functional}, lags[-1])
    figure.savefig(path, format="png")


def _draw_matrix(axes: Axes, distances: Tensor) -> None:
    count = len(distances)
    exponent = power_of_ten(distances)
    scaled = (distances / 10**exponent).numpy()
    image = axes.imshow(scaled, cmap="cividis", vmin=0, extent=(0.5, count + 0.5, count + 0.5, 0.5))
    axes.set_title("RMS distance of all pairs of checkpoints", fontsize=12, loc="left")
    axes.set(xlabel="checkpoint (oldest first)", ylabel="checkpoint")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(min(count, 10), integer=True))
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, pad=0.03)
    bar.outline.set_visible(False)
    bar.set_label(f"in {_power(exponent)}, in the unit of the weights")


def _draw_curves(axes: Axes, sources: Sequence[Source], distances: Tensor, lags: Sequence[int]) -> None:
    scaled = distances / 10 ** power_of_ten(distances)
    for lag, color in zip(lags, _COLORS, strict=False):
        _draw_curve(axes, sources, scaled, lag, color=color, label=f"{lag} before", linewidth=1.8)
    axes.set_title("Distance to an earlier checkpoint", fontsize=12, loc="left")
    _finish_curves(axes, sources, power_of_ten(distances))
    axes.legend(frameon=False, title="which checkpoint", alignment="left")


def _draw_layers(axes: Axes, sources: Sequence[Source], layers: Mapping[str, Tensor], lag: int) -> None:
    exponent = max(map(power_of_ten, layers.values()))
    scaled = {group: distances / 10**exponent for group, distances in layers.items()}
    deep, others = [g for g in layers if is_layer(g)], [g for g in layers if not is_layer(g)]
    shades = matplotlib.colormaps["viridis"]
    step = -(-len(deep) // _NAMED) or 1
    for i, group in enumerate(deep):
        shade = shades(0.9 * i / max(len(deep) - 1, 1))
        label = group if i % step == 0 or i == len(deep) - 1 else None
        _draw_curve(axes, sources, scaled[group], lag, color=shade, label=label, linewidth=1.3)
    for i, group in enumerate(others):
        color = _COLORS[1:][i % (len(_COLORS) - 1)]
        _draw_curve(
            axes, sources, scaled[group], lag, color=color, label=group, linewidth=1.6, linestyle="--"
        )
    axes.set_title(f"Distance to the checkpoint {lag} before, by layer", fontsize=12, loc="left")
    _finish_curves(axes, sources, exponent)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)


def _draw_shares(axes: Axes, sources: Sequence[Source], measures: Mapping[str, Tensor], lag: int) -> None:
    """Each measure as a share of its first value: their units differ."""
    positions, label = _positions(sources)
    for (name, distances), color in zip(measures.items(), _COLORS, strict=False):
        curve = consecutive(distances, lag)
        shares = [value / curve[0] if curve[0] else math.nan for value in curve]
        axes.plot(positions[lag:], shares, marker="o", markersize=3, color=color, label=name)
    axes.set_title(
        f"Distances to the checkpoint {lag} before, as shares of the first", fontsize=12, loc="left"
    )
    axes.set(xlabel=label, ylabel="share of the first")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.legend(frameon=False)


def _draw_curve(axes: Axes, sources: Sequence[Source], distances: Tensor, lag: int, **style: Any) -> None:
    positions, _ = _positions(sources)
    axes.plot(positions[lag:], consecutive(distances, lag), marker="o", markersize=3, **style)


def _finish_curves(axes: Axes, sources: Sequence[Source], exponent: int) -> None:
    _, label = _positions(sources)
    axes.set(xlabel=label, ylabel=f"RMS distance (in {_power(exponent)})")
    axes.margins(x=0.03, y=0.1)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=label == "checkpoint"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)


def _positions(sources: Sequence[Source]) -> tuple[list[float], str]:
    """Each checkpoint's position in the run, and the axis label: tokens, else steps, else numbers."""
    tokens = [s.tokens for s in sources if s.tokens is not None]
    if len(tokens) == len(sources) and _ascending(tokens):
        unit, name = (1e9, "billions") if tokens[-1] >= 2e9 else (1e6, "millions")
        return [t / unit for t in tokens], f"tokens seen ({name})"
    steps = [s.step for s in sources if s.step is not None]
    if len(steps) == len(sources) and _ascending(steps):
        return [float(s) for s in steps], "optimizer step"
    return [float(i + 1) for i in range(len(sources))], "checkpoint"


def _ascending(values: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _power(exponent: int) -> str:
    return f"$10^{{{exponent}}}$"
