"""How many snapshots, how far apart, early and late; and the phases of a cosine schedule."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from benchmarks.papers.spec import Merge, Spec
from benchmarks.papers.study import LENGTHS, MODELS, Model, Study
from benchmarks.papers.verdict import Interval, Verdict, interval, says

TITLE = "The window"

CONCLUSION = (
    "**Ten snapshots, each twenty steps apart, are a fair choice from the middle of these runs on.** "
    "Late, fifteen gain a little more, and three are far behind. Early that window is too long: six "
    "snapshots ten steps apart gain most, and ten of them forty steps apart are worse than no merge. "
    "What counts is how far the window reaches back against how long the run has been: the best windows "
    "of the three steps span 8 to 12 % of it."
)

COUNTS, SPACINGS = (3, 6, 10, 15), (10, 20, 40)

STEPS = {"early": 600, "middle": 1200, "late": LENGTHS[-1]}
"""The first is the earliest that the longest of the widest windows reaches back from."""

COSINE = (600, 1200, 1800, 2400)
"""Steps of the cosine run that are merged at; it ends at the last one."""


def runs(study: Study, seed: int) -> list[Spec]:
    return [*(study.trunk(model, seed) for model in MODELS), cosine(study, seed)]


def cosine(study: Study, seed: int) -> Spec:
    """A run whose learning rate falls along a cosine to a tenth, as Pythia's."""
    return study.trunk("dense", seed, schedule="cosine", floor=0.1)


def measure(study: Study) -> dict[str, Any]:
    return {
        "constant": {
            model: {
                when: {
                    spacing: {n: study.gains(_constant(study, model, step, n, spacing)) for n in COUNTS}
                    for spacing in SPACINGS
                }
                for when, step in STEPS.items()
            }
            for model in MODELS
        },
        "cosine": {step: {n: study.gains(_cosine(study, step, n)) for n in COUNTS} for step in COSINE},
    }


def _constant(study: Study, model: Model, step: int, n: int, spacing: int) -> Any:
    def made(seed: int) -> Merge:
        return study.trunk(model, seed).window(study.steps(step), n, study.steps(spacing))

    return made


def _cosine(study: Study, step: int, n: int) -> Any:
    def made(seed: int) -> Merge:
        return cosine(study, seed).window(study.steps(step), n, study.steps(20))

    return made


def verdicts(figures: dict[str, Any]) -> list[Verdict]:
    return [_long(figures), _early(figures), _pseudo_stable(figures)]


def _long(figures: dict[str, Any]) -> Verdict:
    """15 snapshots against 3, late."""
    loss = {m: _difference(figures, m, "late", 20, (15, 3), "loss") for m in MODELS}
    points = {m: _difference(figures, m, "late", 20, (15, 3), "accuracy") for m in MODELS}
    verdict = says([each.is_positive for each in loss.values()])
    ours = "; ".join(f"{m}: {loss[m].shown()} nats, {points[m].shown(1)} points" for m in MODELS)
    best = "; ".join(f"{m} {_best(figures, m, 'late')}" for m in MODELS)
    return Verdict(
        "Late in training more snapshots are better: 15 beat 3.",
        "[PMA] Fig. 5",
        "about +1 point",
        f"{ours}; best of all: {best}",
        verdict,
        "" if verdict == "holds" else WHY_LONG,
    )


def _early(figures: dict[str, Any]) -> Verdict:
    """The same early, and wide spacing against narrow."""
    long = {m: _difference(figures, m, "early", 20, (15, 3), "loss") for m in MODELS}
    wide = {m: _wide(figures, m) for m in MODELS}
    verdict = says([each.is_negative for each in (*long.values(), *wide.values())])
    ours = "; ".join(
        f"{m}: 15 against 3 snapshots {long[m].shown()} nats, ten 40 apart against 10 apart {wide[m].shown()}"
        for m in MODELS
    )
    best = "; ".join(f"{m} {_best(figures, m, 'early')}" for m in MODELS)
    return Verdict(
        "Early in training many snapshots or a wide spacing hurt.",
        "[PMA] Fig. 5",
        "they hurt",
        f"{ours}; best of all: {best}",
        verdict,
        "" if verdict == "holds" else WHY_EARLY,
    )


def _pseudo_stable(figures: dict[str, Any]) -> Verdict:
    """Ten snapshots 20 steps apart along the cosine."""
    found = {step: interval(figures["cosine"][str(step)]["10"]["loss"]) for step in COSINE}
    first, last = found[COSINE[1]], found[COSINE[-1]]
    verdict = says([first.is_positive, last.mean < first.mean / 3])
    return Verdict(
        "While a cosine schedule's rate is high, merging gains as in a stable phase; at its end hardly.",
        "[PG] Tab. 7",
        "gains in Pythia's pseudo-stable phase",
        ", ".join(f"step {step}: {gain.shown()}" for step, gain in found.items()) + " nats",
        verdict,
        "" if verdict == "holds" else WHY_COSINE,
    )


WHY_LONG = "The longest window is not ahead in both models."
WHY_EARLY = "Not all of these windows are behind."
WHY_COSINE = (
    "The schedule ends at a tenth of its peak, so that some noise is left to average away at its end, too."
)


def _difference(
    figures: dict[str, Any], model: str, when: str, spacing: int, counts: tuple[int, int], score: str
) -> Interval:
    """By how much the first number of snapshots gains more than the second, seed by seed."""
    found = figures["constant"][model][when][str(spacing)]
    pairs = zip(*(found[str(n)][score] for n in counts), strict=True)
    return interval([a - b for a, b in pairs])


def _wide(figures: dict[str, Any], model: str) -> Interval:
    found = figures["constant"][model]["early"]
    pairs = zip(found["40"]["10"]["loss"], found["10"]["10"]["loss"], strict=True)
    return interval([a - b for a, b in pairs])


def _best(figures: dict[str, Any], model: str, when: str) -> str:
    """The window with the greatest mean gain."""
    found = figures["constant"][model][when]
    means = {(n, s): interval(found[s][n]["loss"]).mean for s in found for n in found[s]}
    n, spacing = max(means, key=means.__getitem__)
    return f"{n} snapshots {spacing} apart ({means[n, spacing]:+.3f})"


def draw(figures: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 4)
    for row, model in zip(axes, MODELS, strict=True):
        for axis, when in zip(row, STEPS, strict=False):
            for spacing in SPACINGS:
                found = figures["constant"][model][when][str(spacing)]
                _line(axis, [found[str(n)]["loss"] for n in COUNTS], f"{spacing} apart")
            axis.set(title=f"{model}, {when} (step {STEPS[when]:,})", xlabel="snapshots")
    for step in COSINE:
        _line(axes[0][3], [figures["cosine"][str(step)][str(n)]["loss"] for n in COUNTS], f"step {step:,}")
    axes[0][3].set(title="cosine, 20 apart", xlabel="snapshots")
    axes[0][0].set(ylabel="gain, nats per byte")
    axes[1][0].set(ylabel="gain, nats per byte")
    axes[0][0].legend(fontsize=8)
    axes[0][3].legend(fontsize=8)
    axes[1][3].set_axis_off()
    return figure


def _line(axis: Any, seeds: list[list[float]], label: str) -> None:
    means = [interval(values) for values in seeds]
    axis.errorbar(COUNTS, [m.mean for m in means], [m.half for m in means], label=label, capsize=2)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.grid(alpha=0.3)
