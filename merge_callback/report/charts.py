"""Charts over the steps of a run: lines in SVG, letters in HTML, and the numbers in a table beneath.

The lines are stretched to whatever room there is, so they need no script and look the same on a phone and on
paper. The letters are not part of the drawing, so they keep their size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from merge_callback.report.markup import Html, join, table, tag
from merge_callback.report.numbers import Point, compact, shown, thinned, ticks

_SIDE = 1000  # of the square that a drawing is stretched from
_ROWS = 60  # of a chart's table; of more points every second, third, … is in it
_READ = 240  # points that can be read from a chart, of as many as it has
_NARROW = 260  # pixels that the lines have on a phone
_LETTER = 6.5  # pixels of a letter, at the size of the phases' names


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Args:
        name: in the legend and the tables.
        points: by step.
        color: a CSS colour.
        dashed: draw it with gaps.
        is_named: whether it is in the legend.
    """

    name: str
    points: Sequence[Point]
    color: str
    dashed: bool = False
    is_named: bool = True


@dataclass(frozen=True)
class Axis:
    """What all charts of a page have in common along the steps.

    Args:
        steps: the first step and the last.
        phases: with the steps at which they begin and end.
        restores: steps at which a run was restored.
    """

    steps: tuple[float, float]
    phases: Sequence[tuple[str, float, float]] = ()
    restores: Sequence[float] = ()

    def share(self, step: float) -> float:
        """Where a step lies: 0 is the left end, 1 the right one."""
        low, high = self.steps
        return (step - low) / (high - low)

    def names(self, phase: str, begin: float, end: float) -> bool:
        """Whether a phase is long enough to have its name above it, even on a phone."""
        return (self.share(end) - self.share(begin)) * _NARROW > len(phase) * _LETTER + 6


def chart(
    title: str,
    note: str,
    series: Sequence[Series],
    axis: Axis,
    band: float | None = None,
    from_zero: bool = False,
    show: Callable[[float | None], str] = shown,
) -> Html:
    """A chart and its table.

    Args:
        title: what it shows.
        note: a line that helps to read it.
        series: the lines; those without points are left out.
        axis: of all charts of the page.
        band: what lies nearer to zero is noise, and is shaded.
        from_zero: begin the scale at zero.
        show: writes a value.
    """
    drawn = [s for s in series if s.points]
    if not drawn:
        return Html()
    low, high = _limits(drawn, band, from_zero)
    if (most := max(y for s in drawn for _, y in s.points)) > high:
        note = f"{note} The first values, up to {show(most)}, lie above."
    figure = tag(
        "figure",
        tag("figcaption", tag("h3", title), tag("p", note, class_="note"), _legend(drawn, axis, band)),
        tag(
            "div",
            _phases(axis),
            _scale(low, high),
            tag(
                "div",
                _drawing(drawn, axis, low, high, band, title),
                tag("div", class_="cursor"),
                tag("div", class_="tip", role="status", aria_live="polite"),
                class_="area",
            ),
            _steps(axis),
            class_="plot",
        ),
        _points_of([s for s in drawn if s.is_named], axis, show),
        class_="chart",
        tabindex=0,
        role="group",
        aria_label=f"{title}. Arrow keys read the points.",
    )
    return tag("div", figure, _numbers_of(title, drawn, show), class_="card")


def _limits(series: Sequence[Series], band: float | None, from_zero: bool) -> tuple[float, float]:
    """The scale; the fall from a random start is left out, since it would flatten all the rest."""
    settled = [y for s in series for _, y in list(s.points)[len(s.points) // 8 :]]
    everything = [y for s in series for _, y in s.points]
    low, high = min(everything), max(settled)
    if max(everything) - low < 2 * (high - low):
        high = max(everything)
    if band is not None:
        low, high = min(low, -band), max(high, band)
    if from_zero:
        low = min(0.0, low)
    margin = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    return (low if from_zero and low == 0 else low - margin), high + margin


def _legend(series: Sequence[Series], axis: Axis, band: float | None) -> Html:
    entries = [
        tag("li", tag("i", class_="dashed" if s.dashed else None, style=f"--c:{s.color}"), s.name)
        for s in series
        if s.is_named
    ]
    if band is not None:
        entries.append(tag("li", tag("i", class_="band"), "within the noise"))
    unnamed = dict.fromkeys(p for p, *ends in axis.phases if p != "stable" and not axis.names(p, *ends))
    entries += [tag("li", tag("i", class_=f"phase {phase}"), phase) for phase in unnamed]
    if axis.restores:
        entries.append(tag("li", tag("i", class_="restore"), "restored"))
    return tag("ul", *entries, class_="legend") if len(entries) > 1 else Html()


def _drawing(
    series: Sequence[Series],
    axis: Axis,
    low: float,
    high: float,
    band: float | None,
    title: str,
) -> Html:
    def y(value: float) -> float:
        return _SIDE * (high - value) / (high - low)

    def x(step: float) -> float:
        return _SIDE * axis.share(step)

    shapes = [
        tag("rect", x=f"{x(a):.1f}", y=0, width=f"{x(b) - x(a):.1f}", height=_SIDE, class_=f"phase {phase}")
        for phase, a, b in axis.phases
    ]
    if band is not None:
        shapes.append(
            tag(
                "rect",
                x=0,
                y=f"{y(band):.1f}",
                width=_SIDE,
                height=f"{y(-band) - y(band):.1f}",
                class_="band",
            )
        )
    shapes += [
        _line(0, y(tick), _SIDE, y(tick), "zero" if tick == 0 else "grid") for tick in ticks(low, high)
    ]
    shapes += [_line(x(step), 0, x(step), _SIDE, "restore") for step in axis.restores]
    for s in series:
        path = [(x(step), y(value)) for step, value in thinned(s.points)]
        dots = "" if len(path) > 40 else "".join(f"M{a:.1f} {b:.1f}h0" for a, b in path)
        line = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in path)
        style = f"stroke:{s.color}"
        shapes.append(tag("path", d=line, class_="dashed line" if s.dashed else "line", style=style))
        if dots:
            shapes.append(tag("path", d=dots, class_="dots", style=style))
    ends = ", ".join(f"{s.name} from {shown(s.points[0][1])} to {shown(s.points[-1][1])}" for s in series[:4])
    return tag(
        "svg",
        tag("title", title),
        tag("desc", f"Over the optimizer steps: {ends}."),
        *shapes,
        viewbox=f"0 0 {_SIDE} {_SIDE}",
        preserveaspectratio="none",
        role="img",
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return tag("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=kind)


def _scale(low: float, high: float) -> Html:
    labels = (
        tag("span", compact(tick), style=f"top:{100 * (high - tick) / (high - low):.2f}%")
        for tick in ticks(low, high)
    )
    return tag("div", *labels, class_="scale", aria_hidden="true")


def _steps(axis: Axis) -> Html:
    labels = (
        tag("span", compact(tick), style=f"left:{100 * axis.share(tick):.2f}%") for tick in ticks(*axis.steps)
    )
    return tag("div", *labels, class_="steps", aria_hidden="true")


def _phases(axis: Axis) -> Html:
    """The names of the phases, above them."""
    labels = (
        tag(
            "span",
            phase,
            style=f"left:{100 * axis.share(a):.2f}%;width:{100 * (axis.share(b) - axis.share(a)):.2f}%",
        )
        for phase, a, b in axis.phases
        if axis.names(phase, a, b)
    )
    return tag("div", *labels, class_="phases")


def _points_of(series: Sequence[Series], axis: Axis, show: Callable[[float | None], str]) -> Html:
    """What the script needs: for each step where it lies, and what the lines' values are there."""
    content = json.dumps(
        {
            "names": [s.name for s in series],
            "colors": [s.color for s in series],
            "points": [
                [
                    round(100 * axis.share(step), 2),
                    f"{step:,.0f}",
                    [None if v is None else show(v) for v in values],
                ]
                for step, values in _rows(series, _READ)
            ],
        },
        separators=(",", ":"),
    )
    return tag("script", Html(content.replace("<", "\\u003c")), type="application/json")


def _numbers_of(title: str, series: Sequence[Series], show: Callable[[float | None], str]) -> Html:
    rows = [(f"{step:,.0f}", *map(show, values)) for step, values in _rows(series, _ROWS)]
    numbers = table(("step", *(s.name for s in series)), rows, f"{title}, by step")
    return tag("details", tag("summary", "Numbers"), numbers)


def _rows(series: Sequence[Series], most: int) -> Iterator[tuple[float, list[float | None]]]:
    by_step = [dict(s.points) for s in series]
    steps = sorted({step for values in by_step for step in values})
    every = -(-len(steps) // most) or 1
    for place, step in enumerate(steps):
        if (len(steps) - 1 - place) % every == 0:
            yield step, [values.get(step) for values in by_step]


def grid(*charts: Html, columns: int = 2) -> Html:
    """Charts side by side, as many as there is room for, but no more than some columns."""
    there = [chart for chart in charts if chart]
    return tag("div", join(there), class_=f"grid of-{columns}") if there else Html()
