"""The page of one run or of several: one HTML file that needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.resources import files
from itertools import cycle
from pathlib import Path

import merge_callback
from merge_callback.metrics import DIVERSITY_RMS, described
from merge_callback.report import sections
from merge_callback.report.charts import Axis, Series, chart, grid
from merge_callback.report.history import read_history
from merge_callback.report.markup import Html, join, tag
from merge_callback.report.numbers import Point, in_seconds, number, signed
from merge_callback.report.run_view import RunView, names_of

MARK = tag("meta", name="generator", content="merge-callback report")
"""What tells a page of ours from a file of somebody else's."""

_COLORS = 6  # of different runs

_AT_ONCE = 3  # validation metrics whose charts are in sight

_NAMED = 10  # layers that are in the legend

_OWN = {"live": "var(--live)", "merged": "var(--merged)"}
_FURTHER = [*((f"var(--c{i})", False) for i in (2, 3, 4, 5)), *((f"var(--c{i})", True) for i in (2, 3, 5))]
"""The colours of scores: those of candidates are no other's, dashed ones at last, and not the forecast's."""


def read_runs(folders: Sequence[Path]) -> list[RunView]:
    """The runs of some folders, each with a name that tells it from the others.

    Raises:
        ValueError: for a folder without an event file, or with one of a later format.
    """
    histories = [read_history(folder) for folder in folders]
    names = names_of([history.folder for history in histories])
    return [RunView(name, history) for name, history in zip(names, histories, strict=True)]


def page(runs: Sequence[RunView], target: Path, refresh: str = "") -> str:
    """The page.

    Args:
        runs: what it shows.
        target: the folder that it goes to, for its links.
        refresh: a script that has the page drawn again; empty for a page that stays.
    """
    several = len(runs) > 1
    title = "Merging: " + ", ".join(run.name for run in runs)
    axis = _axis(runs)
    body = [
        _several_at_the_top(runs) if several else _at_the_top(runs[0]),
        *_scores(runs, axis),
        *_weights(runs, axis),
        *(part for run in runs for part in _of_a_run(run, axis, target, several)),
        _logged(runs, axis),
        _footer(runs),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag(
            "meta",
            http_equiv="Content-Security-Policy",
            content=policy + "; connect-src 'self'" * bool(refresh),
        ),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        MARK,
        tag("title", title),
        Html(f"<style>{_resource('page.css')}</style>"),
    )
    script = Html(f"<script>{_resource('page.js')}{refresh}</script>")
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *body), script), lang='en')}\n"


def _resource(name: str) -> str:
    return (files("merge_callback.report") / name).read_text(encoding="utf-8")


def _axis(runs: Sequence[RunView]) -> Axis:
    """All charts have the same steps; phases and restores are drawn if there is one run."""
    last = float(max(*(run.step for run in runs), 1))
    if len(runs) > 1:
        return Axis((0.0, last))
    return Axis((0.0, last), runs[0].phases, [event["step"] for event in runs[0].restores])


def _at_the_top(run: RunView) -> Html:
    word, sentence = run.status
    return tag(
        "header",
        tag("div", tag("h1", run.name), tag("span", word, class_=f"badge {word}"), class_="title"),
        tag("p", f"What merging did for this run. {sentence}", class_="lead"),
        sections.tiles(run),
        sections.facts(run),
    )


def _several_at_the_top(runs: Sequence[RunView]) -> Html:
    return tag(
        "header",
        tag("div", tag("h1", f"{len(runs)} runs"), class_="title"),
        tag("p", "What merging did for them.", class_="lead"),
        sections.comparison(runs),
    )


def _scores(runs: Sequence[RunView], axis: Axis) -> list[Html]:
    """The validation's metrics, of live and of merged weights, each with the gain beside it."""
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    pairs = [grid(_score(runs, name, axis), _gain(runs, name, axis)) for name in names]
    pairs = [pair for pair in pairs if pair]
    if not pairs:
        return [tag("h2", "Validation"), tag("p", "Nothing was validated yet.", class_="note")]
    rest = pairs[_AT_ONCE:]
    more = tag("details", tag("summary", f"{len(rest)} further metrics"), join(rest), class_="more")
    return [tag("h2", "Live and merged weights"), *pairs[:_AT_ONCE], *([more] if rest else [])]


def _score(runs: Sequence[RunView], name: str, axis: Axis) -> Html:
    lines = []
    for place, run in enumerate(runs):
        further = cycle(_FURTHER)
        for whose, points in run.scores(name).items():
            color, is_dashed = (_OWN[whose], False) if whose in _OWN else next(further)
            label = f"{whose} weights" if whose in _OWN else whose
            if len(runs) > 1:
                color, is_dashed, label = _color(place), whose == "live", f"{run.name}, {whose}"
            lines.append(Series(label, points, color, is_dashed))
    note = "Of the validation, at each of its steps."
    if len(runs) == 1:
        lines.append(Series("forecast of a decay", runs[0].forecast(name), "var(--c4)", dashed=True))
        note += runs[0].told_forecast(name)
    return chart(name, note, lines, axis)


def _gain(runs: Sequence[RunView], name: str, axis: Axis) -> Html:
    noise = [run.noise(name) for run in runs]
    band = 2 * noise[0] if len(runs) == 1 and noise[0] else None
    return chart(
        f"Gain in {name}",
        "Positive is better." + " Shaded: how much live values scatter." * (band is not None),
        _lines(runs, [run.gains(name) for run in runs], "gain", "var(--gain)"),
        axis,
        band,
        show=lambda value: signed(value, 4),
    )


def _weights(runs: Sequence[RunView], axis: Axis) -> list[Html]:
    """Diversity of all kinds, and the learning rate."""
    kinds = dict.fromkeys(name for run in runs for name in run.functional)
    charts = [
        chart(
            "Diversity",
            _meaning(DIVERSITY_RMS),
            _lines(runs, [run.diversity for run in runs], "RMS distance", "var(--diversity)"),
            axis,
            from_zero=True,
        ),
        _layers(runs, axis),
        *(
            chart(
                name,
                _meaning(name),
                _lines(runs, [run.functional.get(name, []) for run in runs], name, "var(--diversity)"),
                axis,
                from_zero=True,
            )
            for name in kinds
        ),
        chart(
            "Learning rate",
            "The highest that was applied, at each snapshot.",
            _lines(runs, [run.learning_rates for run in runs], "learning rate", "var(--rate)"),
            axis,
            from_zero=True,
        ),
    ]
    return [tag("h2", "Diversity and learning rate"), grid(*charts, columns=3)]


def _layers(runs: Sequence[RunView], axis: Axis) -> Html:
    """The diversity of every layer, from the first (blue) to the last (red)."""
    if len(runs) > 1:
        return Html()
    layers = runs[0].layers
    every = -(-len(layers) // _NAMED) or 1
    lines = [
        Series(
            name,
            points,
            f"hsl({250 - 235 * place / max(1, len(layers) - 1):.0f} 62% var(--layer))",
            is_named=place % every == 0 or place == len(layers) - 1,
        )
        for place, (name, points) in enumerate(layers.items())
    ]
    return chart("Diversity by layer", "The same for each layer.", lines, axis, from_zero=True)


def _of_a_run(run: RunView, axis: Axis, target: Path, several: bool) -> list[Html]:
    name = f" of {run.name}" if several else ""
    stall = Series("training waited", _entry(run, "stall"), "var(--merged)")
    background = Series("in the background", _entry(run, "background"), "var(--live)")
    return [
        tag("h2", f"Spikes, restores and advice{name}"),
        sections.events(run),
        tag("h2", f"Merges{name}"),
        sections.merges(run, target),
        sections.candidates(run),
        sections.window(run),
        tag("h2", f"What it cost{name}"),
        sections.costs(run),
        grid(
            chart("Training waited", "Seconds for each snapshot.", [stall], axis, None, True, _seconds),
            chart(
                "Work in the background",
                "Seconds for each snapshot.",
                [background],
                axis,
                None,
                True,
                _seconds,
            ),
        ),
    ]


def _logged(runs: Sequence[RunView], axis: Axis) -> Html:
    """Every number that the callback logged, with its meaning."""
    names = dict.fromkeys(name for run in runs for name in run.logged)
    charts = [
        chart(
            name,
            _meaning(name),
            _lines(runs, [run.logged.get(name, []) for run in runs], name, "var(--c0)"),
            axis,
        )
        for name in names
    ]
    if not charts:
        return Html()
    note = "The same numbers are in the run's loggers."
    return tag(
        "section",
        tag("h2", "All logged numbers"),
        tag(
            "details",
            tag("summary", f"{len(charts)} charts"),
            tag("p", note, class_="note"),
            grid(*charts, columns=3),
        ),
    )


def _footer(runs: Sequence[RunView]) -> Html:
    now = time.strftime("%Y-%m-%d %H:%M")
    lines = [tag("p", f"Drawn {now} by merge_callback {merge_callback.__version__}.")]
    for run in runs:
        about = run.run
        versions = ", ".join(f"{name} {version}" for name, version in (about.get("versions") or {}).items())
        lines.append(tag("p", f"{run.name}: run {about.get('run_id')}, {run.history.folder}; {versions}."))
    return tag("footer", *lines)


def _lines(runs: Sequence[RunView], points: Sequence[Sequence[Point]], name: str, color: str) -> list[Series]:
    """A line for each run: in its own colour, if there are several."""
    if len(runs) == 1:
        return [Series(name, points[0], color)]
    return [Series(run.name, p, _color(i)) for i, (run, p) in enumerate(zip(runs, points, strict=True))]


def _color(place: int) -> str:
    return f"var(--c{place % _COLORS})"


def _entry(run: RunView, name: str) -> list[Point]:
    return [(e["step"], y) for e in run.snapshots if (y := number(e.get(name))) is not None]


def _seconds(value: float | None) -> str:
    return "" if value is None else in_seconds(value)


def _meaning(name: str) -> str:
    known = described(name)
    return known.meaning.replace("`", "") if known else ""
