"""Merging in the stable phase, at three lengths of training, and along three decays."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure

from benchmarks.papers.spec import Merge, Spec
from benchmarks.papers.study import DECAY, LENGTHS, MODELS, Study
from benchmarks.papers.verdict import Interval, Verdict, interval, says

TITLE = "Merging in the stable phase and in the decay"

CONCLUSION = (
    "**Merge while the learning rate is constant.** Every linear method is ahead of the last weights in "
    "every seed there, and more so the longer the run. In a decay the gain falls with the learning "
    "rate. At its end the merge is no better than the last weights, and after a short decay it is "
    "worse. Halfway down, methods that lean on newer snapshots (`ema`, `wma`) are ahead of the plain "
    "mean."
)

METHODS = ("sma", "ema", "wma")

N, SPACING = 10, 20
"""Snapshots of a merge, and steps between them."""

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of a decay, at which it is merged."""

CURVE = range(200, LENGTHS[-1] + 1, 200)
"""Steps of the trunk whose merges are drawn."""


def runs(study: Study, seed: int) -> list[Spec]:
    return study.standard(seed)


def measure(study: Study) -> dict[str, Any]:
    return {
        "stable": {m: {s: _at(study, m, s) for s in CURVE} for m in MODELS},
        "decay": {
            m: {n: {share: _in_decay(study, m, n, share) for share in SHARES} for n in LENGTHS}
            for m in MODELS
        },
    }


def _at(study: Study, model: Any, step: int) -> dict[str, Any]:
    """The live loss at a step of the trunk, and the gains of its merges."""
    last = min(N, step // SPACING)

    def made(seed: int, method: str) -> Merge:
        return study.trunk(model, seed).window(study.steps(step), last, study.steps(SPACING), method)

    return _figures(study, made)


def _in_decay(study: Study, model: Any, length: int, share: float) -> dict[str, Any]:
    """The same within a decay, of which alone the snapshots are merged, as the callback does."""
    steps = round(length * DECAY * share)
    last = min(N, steps // SPACING)

    def made(seed: int, method: str) -> Merge:
        decay = study.decay(model, seed, length)
        return decay.window(study.steps(length + steps), last, study.steps(SPACING), method)

    return _figures(study, made)


def _figures(study: Study, made: Any) -> dict[str, Any]:
    live = [study.score(made(seed, "sma").parts[-1]) for seed in study.seeds]
    return {
        "live": {"loss": [score.loss for score in live], "accuracy": [score.accuracy for score in live]},
        **{method: study.gains(lambda seed, m=method: made(seed, m)) for method in METHODS},  # type: ignore[misc]
    }


def verdicts(figures: dict[str, Any]) -> list[Verdict]:
    stable, decay = _stable(figures), _ends(figures)
    cells = list(stable.values())
    worst = min(min(values) for values in cells)
    points = [interval(values) for values in _stable(figures, "accuracy").values()]
    ends = [interval(values) for values in decay.values()]
    end_points = [interval(values) for values in _ends(figures, "accuracy").values()]
    ratio = _mean(ends) / _mean([interval(values) for values in cells])
    falls = [_falls(figures, model, length) for model in MODELS for length in LENGTHS]
    halves = [interval(_half(figures, model, n)) for model in MODELS for n in LENGTHS]
    return [
        Verdict(
            "In the stable phase every linear merge gains.",
            "[PG] Tab. 2; [PMA] Fig. 1",
            "+1.6 to +1.8 points at 2B",
            f"{_range(points, 1)} points, {_range([interval(v) for v in cells])} nats (3 methods, 3 lengths, "
            f"2 models); the least of one seed is {worst:+.3f}",
            says([min(values) > 0 for values in cells]),
            WHY_STABLE if worst <= 0 else "",
        ),
        Verdict(
            "In the decay the gain shrinks, to little at its end.",
            "[PG] Tab. 2",
            "+0.1 to +0.5 points",
            f"{_range(halves)} nats halfway, {_range(ends, 4)} at the end, which is {100 * ratio:.0f} % of "
            "the stable phase's gain",
            says(falls),
            "" if all(falls) else WHY_FALL,
        ),
        Verdict(
            "At the end of the decay a merge is still a little better than the last weights.",
            "[PG] Tab. 2",
            "+0.1 to +0.5 points",
            f"{_range(ends, 4)} nats, {_range(end_points, 2)} points; "
            f"{sum(end.is_positive for end in ends)} of {len(ends)} intervals lie above 0, "
            f"{sum(end.is_negative for end in ends)} below",
            says([end.is_positive for end in ends]),
            "" if all(end.is_positive for end in ends) else WHY_END,
        ),
    ]


WHY_STABLE = "Early in a short run the loss still falls faster than the average over the window can follow."

WHY_FALL = "The gain does not fall in each of the decays."

WHY_END = (
    "At the end of these short decays the loss still falls by more from snapshot to snapshot than the "
    "last steps' noise is worth: the mean goes back by 90 steps on average, and there is little left "
    "to average away, as the learning rate has come down to 0. The shorter the decay, the more is "
    "lost; after the longest one the merge is about as good as the last weights. In a decay of "
    "billions of tokens ten snapshots go back by a smaller share of it."
)


def _stable(figures: dict[str, Any], score: str = "loss") -> dict[tuple[str, int, str], list[float]]:
    return {
        (model, length, method): figures["stable"][model][str(length)][method][score]
        for model in MODELS
        for length in LENGTHS
        for method in METHODS
    }


def _ends(figures: dict[str, Any], score: str = "loss") -> dict[tuple[str, int, str], list[float]]:
    return {
        (model, length, method): figures["decay"][model][str(length)]["1.0"][method][score]
        for model in MODELS
        for length in LENGTHS
        for method in METHODS
    }


def _half(figures: dict[str, Any], model: str, length: int) -> list[float]:
    found: list[float] = figures["decay"][model][str(length)]["0.5"]["sma"]["loss"]
    return found


def _falls(figures: dict[str, Any], model: str, length: int) -> bool:
    """Whether a mean gain at the end of the decay is less than a third of that before it."""
    before = interval(figures["stable"][model][str(length)]["sma"]["loss"]).mean
    return interval(figures["decay"][model][str(length)]["1.0"]["sma"]["loss"]).mean < before / 3


def _mean(intervals: list[Interval]) -> float:
    return math.fsum(each.mean for each in intervals) / len(intervals)


def _range(intervals: list[Interval], digits: int = 3) -> str:
    """From the least to the greatest mean, with the widest interval."""
    means = sorted(each.mean for each in intervals)
    half = max(each.half for each in intervals)
    return f"{means[0]:+.{digits}f} to {means[-1]:+.{digits}f} (± {half:.{digits}f} at most)"


def draw(figures: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, model in zip(figure.subplots(1, 2), MODELS, strict=True):
        steps = [step for step in CURVE if step >= 400]
        _line(axis, steps, [figures["stable"][model][str(s)] for s in steps], "tab:blue", "constant rate")
        for length, colour in zip(LENGTHS, ("tab:green", "tab:orange", "tab:red"), strict=True):
            found = figures["decay"][model][str(length)]
            steps = [round(length * (1 + DECAY * share)) for share in SHARES]
            _line(axis, steps, [found[str(share)] for share in SHARES], colour, f"decay after {length}")
        axis.set(title=model, xlabel="step", ylabel="loss, nats per byte")
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8, title="solid: live, dashed: sma of ten")
    return figure


def _line(axis: Any, steps: list[int], points: list[dict[str, Any]], colour: str, label: str) -> None:
    live = [interval(point["live"]["loss"]).mean for point in points]
    merged = [mean - interval(point["sma"]["loss"]).mean for mean, point in zip(live, points, strict=True)]
    axis.plot(steps, live, color=colour, label=label)
    axis.plot(steps, merged, color=colour, linestyle="--")
