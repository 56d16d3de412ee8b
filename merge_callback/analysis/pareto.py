"""Which merges no other one beats in two metrics at once, and a picture of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_SIZE, _DPI = (8.0, 5.6), 150  # inches, and pixels per inch
_BEST, _OTHER = "#0072B2", "#767676"
_NAMED = 12  # points of the front that have their names beside them


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of those that no other beats, by the first number.

    Args:
        points: two finite scores of each, higher being better.
    """
    front: list[str] = []
    best = float("-inf")
    for name, (_, second) in sorted(points.items(), key=lambda p: p[1], reverse=True):
        if second > best:
            front.append(name)
            best = second
    return front


def draw_pareto(
    points: Mapping[str, tuple[float, float]],
    front: Sequence[str],
    labels: tuple[str, str],
    reference: str | None = None,
) -> bytes:
    """A PNG of all merges by two metrics, the front joined and named.

    Args:
        points: the values of both metrics of each.
        front: names, in order.
        labels: of the axes.
        reference: the name of what the merges are compared with.
    """
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        others = [at for name, at in points.items() if name not in front and name != reference]
        axes.plot([x for x, _ in others], [y for _, y in others], "o", color=_OTHER, markersize=4)
        on_front = [points[name] for name in front]
        axes.plot(
            *zip(*on_front, strict=True), "o-", color=_BEST, markersize=6, linewidth=1, label="not beaten"
        )
        if reference is not None:
            axes.plot(*points[reference], "D", color="#D55E00", markersize=6, label=reference)
        for i, name in enumerate(front[:_NAMED]):
            below = i % 2
            axes.annotate(
                name,
                points[name],
                xytext=(6, -11 if below else 6),
                textcoords="offset points",
                color=_BEST,
                fontsize=8,
            )
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.margins(x=0.18, y=0.12)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        made = BytesIO()
        figure.savefig(made, format="png", metadata={"Software": None})
    return made.getvalue()
