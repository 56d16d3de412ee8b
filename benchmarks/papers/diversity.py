"""Diversity over training, in the weights and in what the model computes, and how the gain goes with it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers import rates
from benchmarks.papers.curves import band
from benchmarks.papers.distances import distances
from benchmarks.papers.paired import extent, listed, ratio
from benchmarks.papers.spec import Spec
from benchmarks.papers.study import DECAY, LENGTHS, MODELS, Model, Study
from benchmarks.papers.verdict import Interval, Verdict, interval, says

TITLE = "Diversity, and what it says about the gain"

CONCLUSION = """\
In one run diversity is a good gauge: when it falls below a fifth of what it was in the stable phase, there
is hardly anything left for a merge to gain. RMS of the weights, which costs no forward pass, says it as
well as what the model computes. Don't compare the number between runs, learning rates or early and late
training: within the stable phase it tells nothing about the gain."""

N, SPACING, LAG = 10, 10, 2
"""Snapshots of a merge, steps between them, and intervals between the two that diversity compares."""

STABLE = range(200, LENGTHS[-1] + 1, 200)
"""Steps of the trunk."""

MEASURES = {
    "rms": "RMS of the weights",
    "activations": "cosine distance of activations",
    "logits": "cosine distance of logits",
    "probabilities": "KL of probabilities",
}

BEST, SMALL = 0.8, 20
"""The correlation that is expected, and what percentage of the stable phase's diversity is near 0."""

COLOURS = ("tab:green", "tab:orange", "tab:red")

Points = list[dict[str, Any]]


def runs(study: Study, seed: int) -> list[Spec]:
    return [*study.standard(seed), *(rates.trunk(study, seed, rate) for rate in rates.RATES)]


def measure(study: Study) -> dict[str, Any]:
    return {
        "points": {model: _points(study, model) for model in MODELS},
        "rates": [
            {"rate": rate, **_at(study, [rates.trunk(study, seed, rate) for seed in study.seeds], step)}
            for rate in rates.RATES
            for step in (600, 800, 1000)
        ],
    }


def _points(study: Study, model: Model) -> Points:
    """Of the trunk and of its decays, in which a merge has snapshots of the decay alone."""
    trunks = [study.trunk(model, seed) for seed in study.seeds]
    found = [{"decay": 0, **_at(study, trunks, step)} for step in STABLE]
    for length in LENGTHS:
        decays = [study.decay(model, seed, length) for seed in study.seeds]
        for own in range(N * SPACING, round(length * DECAY) + 1, 50):
            found.append({"decay": length, **_at(study, decays, length + own)})
    return found


def _at(study: Study, lines: Sequence[Spec], step: int) -> dict[str, Any]:
    """The diversities and the gain of the merge at a step, for each seed."""
    at, spacing = study.steps(step), study.steps(SPACING)
    windows = [line.window(at, N, spacing) for line in lines]
    pairs = [(window.parts[-1 - LAG], window.parts[-1]) for window in windows]
    moved = [distances(study, *pair) for pair in pairs]
    return {
        "step": step,
        "gain": [study.gain(window).loss for window in windows],
        **{name: [each[name] for each in moved] for name in MEASURES},
    }


def verdicts(figures: dict[str, Any]) -> list[Verdict]:
    return [_flat(figures), _falls(figures), _functional(figures), _correlates(figures), _by_rate(figures)]


def _flat(figures: dict[str, Any]) -> Verdict:
    found = {}
    for model in MODELS:
        late, early = (_at_step(figures, model, 0, step)["rms"] for step in (LENGTHS[2], LENGTHS[1]))
        found[model] = ratio(late, early)
    holds = [abs(each.mean - 100) < 10 for each in found.values()]
    shown = ", ".join(f"{each.shown(0, sign=False)} % ({model})" for model, each in found.items())
    return Verdict(
        "Diversity is flat while the learning rate is.",
        "[PG] Fig. 1",
        "flat",
        f"RMS at step 2,400 is {shown} of that at 1,600",
        says(holds),
        "" if all(holds) else WHY_FLAT,
    )


def _falls(figures: dict[str, Any]) -> Verdict:
    found = _ends(figures, "rms")
    holds = [each.mean < SMALL for each in found]
    return Verdict(
        "It falls towards 0 with the learning rate.",
        "[PG] Fig. 1, 7, 8",
        "towards 0",
        f"{extent(found, 1, ' %', sign=False)} of the stable phase's at its end (3 lengths, 2 models)",
        says(holds),
        "" if all(holds) else WHY_FALLS,
    )


def _functional(figures: dict[str, Any]) -> Verdict:
    found = {name: _ends(figures, name) for name in list(MEASURES)[1:]}
    holds = [each.mean < SMALL for ends in found.values() for each in ends]
    return Verdict(
        "So does what the model computes: activations, logits, probabilities.",
        "[PG] Fig. 9",
        "towards 0",
        "of the stable phase's "
        + "; ".join(f"{name} {extent(ends, 1, ' %', sign=False)}" for name, ends in found.items()),
        says(holds),
        "" if all(holds) else WHY_FUNCTIONAL,
    )


def _correlates(figures: dict[str, Any]) -> Verdict:
    points = figures["points"]
    places = {
        where: [interval(correlations(points[model], "rms", where)) for model in MODELS] for where in WHERE
    }
    others = {
        name: [interval(correlations(points[model], name, "everywhere")) for model in MODELS]
        for name in list(MEASURES)[1:]
    }
    holds = [each.mean >= BEST for each in places["everywhere"]]
    return Verdict(
        "The gain of the merge goes with RMS diversity.",
        "[PG] Fig. 3",
        "a strong correlation",
        f"Pearson's r (dense, MoE): {listed(places, 2)}; of other measures everywhere: {listed(others, 2)}",
        says(holds),
        "" if all(holds) else WHY_CORRELATES,
    )


def _by_rate(figures: dict[str, Any]) -> Verdict:
    found = {name: [interval(_correlation(figures["rates"], name))] for name in MEASURES}
    holds = found["rms"][0].mean >= BEST
    return Verdict(
        "So it does among constant learning rates.",
        "[PG] Fig. 3",
        "not compared there",
        f"Pearson's r over three rates and three steps: {listed(found, 2)}",
        says([holds]),
        "" if holds else WHY_RATE,
    )


WHY_FLAT = "It drifts by more than a tenth in one of the models."
WHY_FALLS = "At the end of one of the decays more than a fifth of it is left."
WHY_FUNCTIONAL = "At the end of one of the decays more than a fifth of one of the measures is left."
WHY_CORRELATES = (
    "The correlation comes from the fall of both in the decay. Within the stable phase diversity hardly "
    "changes while the gain still grows, because early in training an average lags behind the model."
)
WHY_RATE = (
    "Adam's steps make the distance between snapshots proportional to the learning rate, whatever it is "
    "good for: from 0.004 to 0.016 RMS grows 3.5-fold. The gain does not. A higher rate also slows the "
    "training down, and while the loss falls fast an average of past weights gains less: at each rate the "
    "gain grows from step 600 to step 1,000, although the distance does not. RMS tells how the gain "
    "changes along one run, not which run gains more."
)

WHERE: dict[str, Callable[[dict[str, Any]], bool]] = {
    "everywhere": lambda point: point["step"] > STABLE[0],
    "stable": lambda point: point["decay"] == 0 and point["step"] > STABLE[0],
    "decay": lambda point: point["decay"] > 0,
}
"""Which points a correlation is over; at the first of the trunk the loss still falls steeply."""


def correlations(points: Points, name: str, where: str) -> list[float]:
    """Pearson's r of the gain with a measure, over the points of each seed."""
    return _correlation([point for point in points if WHERE[where](point)], name)


def _correlation(points: Points, name: str) -> list[float]:
    seeds = range(len(points[0]["gain"]))
    return [
        statistics.correlation([p[name][s] for p in points], [p["gain"][s] for p in points]) for s in seeds
    ]


def _at_step(figures: dict[str, Any], model: str, decay: int, step: int) -> dict[str, Any]:
    """A point by the length before its decay, 0 for the trunk, and its step."""
    points: Points = figures["points"][model]
    return next(p for p in points if (p["decay"], p["step"]) == (decay, step))


def _usual(figures: dict[str, Any], model: str, name: str) -> list[float]:
    """A measure in the stable phase, its mean over the second half of the trunk, of each seed."""
    points = [p for p in figures["points"][model] if p["decay"] == 0 and 2 * p["step"] > STABLE[-1]]
    return [statistics.mean(seed) for seed in zip(*(p[name] for p in points), strict=True)]


def _ends(figures: dict[str, Any], name: str) -> list[Interval]:
    """A measure at the end of each decay as a percentage of the stable phase's."""
    found = []
    for model in MODELS:
        usual = _usual(figures, model, name)
        for length in LENGTHS:
            end = _at_step(figures, model, length, round(length * (1 + DECAY)))[name]
            found.append(ratio(end, usual))
    return found


def draw(figures: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    for row, model in zip(figure.subplots(2, 3), MODELS, strict=True):
        points = figures["points"][model]
        _draw_rms(row[0], points, model)
        _draw_measures(row[1], figures, model)
        _draw_gain(row[2], points, figures["rates"] if model == "dense" else [], model)
    return figure


def _draw_rms(axis: Axes, points: Points, model: str) -> None:
    for length, colour in ((0, "black"), *zip(LENGTHS, COLOURS, strict=True)):
        own = [p for p in points if p["decay"] == length]
        label = f"decay after {length}" if length else "constant rate"
        band(axis, [p["step"] for p in own], [p["rms"] for p in own], color=colour, label=label)
    axis.set(title=f"{model}: RMS over training", xlabel="step", ylabel="RMS of 20 steps", ylim=(0, 0.034))
    axis.legend(fontsize=8, ncol=2, loc="upper right")
    axis.grid(alpha=0.3)


def _draw_measures(axis: Axes, figures: dict[str, Any], model: str) -> None:
    for name, label in MEASURES.items():
        own = [p for p in figures["points"][model] if p["decay"] in (0, LENGTHS[-1])]
        usual = _usual(figures, model, name)
        shares = [[100 * a / b for a, b in zip(p[name], usual, strict=True)] for p in own]
        axis.plot([p["step"] for p in own], [statistics.mean(share) for share in shares], label=label)
    axis.axvline(LENGTHS[-1], color="grey", linestyle=":")
    axis.set(title=f"{model}: the decay begins at the dotted line", xlabel="step")
    axis.set(ylabel="% of the stable phase's", yscale="log")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def _draw_gain(axis: Axes, points: Points, by_rate: Points, model: str) -> None:
    kinds = {
        "stable": [p for p in points if WHERE["stable"](p)],
        "decay": [p for p in points if WHERE["decay"](p)],
        **{f"constant, {rate:g}": [p for p in by_rate if p["rate"] == rate] for rate in (4e-3, 1.6e-2)},
    }
    for name, found in kinds.items():
        if found:
            x, y = ([value for p in found for value in p[what]] for what in ("rms", "gain"))
            axis.scatter(x, y, s=9, alpha=0.6, label=name)
    r = interval(correlations(points, "rms", "everywhere"))
    axis.set(title=f"{model}: r = {r.shown(2, sign=False)} (stable, decay)")
    axis.set(xlabel="RMS of 20 steps", ylabel="gain of the merge, nats per byte")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
