"""All methods at four points of a run, and the options of SLERP, TIES and WSM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.papers.spec import Merge, Spec
from benchmarks.papers.study import DECAY, LENGTHS, MODELS, Model, Study
from benchmarks.papers.verdict import Interval, Verdict, interval, says

TITLE = "The methods"

CONCLUSION = (
    "**At a constant rate a plain mean is as good as any:** `sma`, the default there. Early in a run "
    "and in a decay, those methods are ahead that lean on newer snapshots: `slerp`, `ema`, `wma`, "
    "`meta`. **TIES, which [PG] recommends for the decay, is not ahead there:** halfway it is behind "
    "the plain mean, and at the end level with it. This is why the default in the decay is `ema`. "
    "Nowhere is a method that drops or elects entries (`ties`, `dare`) ahead of the best linear one."
)

N, SPACING = 10, 20

LENGTH = LENGTHS[-1]

POINTS = {
    "early": 400,
    "stable": LENGTH,
    "half of the decay": round(LENGTH * (1 + DECAY / 2)),
    "end of the decay": round(LENGTH * (1 + DECAY)),
}
"""Steps; each merge is of one phase's snapshots."""

METHODS = ("sma", "wma", "ema", "wsm", "slerp", "task_arithmetic", "ties", "dare", "dropout", "noise", "meta")

OPTIONS: dict[str, Sequence[Any]] = {
    "slerp t": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7),
    "ties density": (0.2, 0.4, 0.6, 0.8, 0.9, 1.0),
    "wsm decay": ("1-sqrt", "linear", "cosine"),
}

SPACINGS = (10, 20, 30)
"""Steps between the snapshots of TIES and SMA; ten of them span up to the half of the decay."""

SYNTHETIC = ("ties", "dropout", "meta")
"""What [PG] finds to help in the decay."""


def runs(study: Study, seed: int) -> list[Spec]:
    return [study.trunk(model, seed) for model in MODELS] + [_decay(study, m, seed) for m in MODELS]


def measure(study: Study) -> dict[str, Any]:
    return {
        "methods": {
            model: {
                point: {method: study.gains(_merge(study, model, point, method)) for method in METHODS}
                for point in POINTS
            }
            for model in MODELS
        },
        "options": {
            model: {
                point: {name: _options(study, model, point, name) for name in OPTIONS}
                for point in list(POINTS)[1:]
            }
            for model in MODELS
        },
        "spacing": {
            model: {
                point: {
                    method: {s: study.gains(_merge(study, model, point, method, s)) for s in SPACINGS}
                    for method in ("ties", "sma")
                }
                for point in list(POINTS)[1:]
            }
            for model in MODELS
        },
    }


def _options(study: Study, model: Model, point: str, name: str) -> dict[str, Any]:
    """The gains by the values of one option."""
    method, option = name.split()
    return {
        str(value): study.gains(_merge(study, model, point, method, SPACING, **{option: value}))
        for value in OPTIONS[name]
    }


def _merge(
    study: Study, model: Model, point: str, method: str, spacing: int = SPACING, **options: Any
) -> Any:
    """What names the merge for a seed: of ten snapshots, fewer if the phase has no more."""
    step = POINTS[point]
    begin = LENGTH if step > LENGTH else 0
    last = min(N, (step - begin) // spacing)

    def made(seed: int) -> Merge:
        line = _decay(study, model, seed)
        return line.window(study.steps(step), last, study.steps(spacing), method, **options)

    return made


def _decay(study: Study, model: Model, seed: int) -> Spec:
    return study.decay(model, seed, LENGTH)


def verdicts(figures: dict[str, Any]) -> list[Verdict]:
    return [
        _early(figures),
        _synthetic_in_decay(figures),
        _synthetic_in_stable(figures),
        _slerp(figures),
        _ties(figures),
    ]


def _early(figures: dict[str, Any]) -> Verdict:
    """WMA against SMA and EMA at the early point."""
    against = {
        (model, other): _difference(figures, model, "early", "wma", other)
        for model in MODELS
        for other in ("sma", "ema")
    }
    late = [_difference(figures, model, "stable", "wma", "sma") for model in MODELS]
    verdict = says([each.is_positive for each in against.values()])
    return Verdict(
        "Early in training WMA is the best of SMA, EMA and WMA; later they are about equal.",
        "[PMA] Fig. 4",
        "WMA best at first",
        "; ".join(f"{model}: {d.shown()} nats over {other}" for (model, other), d in against.items())
        + f"; later {_listed(late)} over sma",
        verdict,
        WHY_EARLY if verdict != "holds" else "",
    )


def _synthetic_in_decay(figures: dict[str, Any]) -> Verdict:
    found: dict[tuple[str, str, str], Interval] = {
        (model, point, method): _difference(figures, model, point, method, "sma")
        for model in MODELS
        for point in list(POINTS)[2:]
        for method in SYNTHETIC
    }
    verdict = says([each.is_positive for each in found.values()])
    return Verdict(
        "In the decay TIES, dropout and meta give more than a plain mean.",
        "[PG] Tab. 3",
        "up to +0.8 points",
        "over sma: " + _by_method(found),
        verdict,
        WHY_DECAY if verdict != "holds" else "",
    )


def _synthetic_in_stable(figures: dict[str, Any]) -> Verdict:
    found: dict[tuple[str, str, str], Interval] = {
        (model, "stable", method): _difference(figures, model, "stable", method, "sma")
        for model in MODELS
        for method in SYNTHETIC
    }
    verdict = says([not each.is_positive for each in found.values()])
    return Verdict(
        "In the stable phase they give nothing, or less than a plain mean.",
        "[PG] Tab. 3",
        "nothing or less",
        "over sma: " + _by_method(found),
        verdict,
        "" if verdict == "holds" else WHY_STABLE,
    )


def _slerp(figures: dict[str, Any]) -> Verdict:
    means = {model: _means(figures["options"][model]["stable"]["slerp t"]) for model in MODELS}
    over = [_difference(figures, model, "stable", "slerp", "sma") for model in MODELS]
    falls = [each["0.7"] < each["0.4"] for each in means.values()]
    best = [max(each, key=each.__getitem__) for each in means.values()]
    return Verdict(
        "SLERP along the trajectory has its best t below a half.",
        "[PG] §3.3, Fig. 4",
        "t = 0.4",
        f"best t {' and '.join(best)} (dense, MoE); at t = 0.4 {_listed(over)} nats over sma",
        says(falls),
        "" if all(falls) else WHY_SLERP,
    )


def _ties(figures: dict[str, Any]) -> Verdict:
    best = {
        (model, point): _best(figures["options"][model][point]["ties density"])
        for model in MODELS
        for point in list(POINTS)[1:]
    }
    fits = [density in ("0.6", "0.8", "0.9") for density in best.values()]
    shown = "; ".join(f"{model}, {point}: {density}" for (model, point), density in best.items())
    return Verdict(
        "TIES is best at a density of about 0.8.",
        "[PG] App. B.2, Fig. 5",
        "0.8",
        f"best density: {shown}",
        says(fits),
        "" if all(fits) else WHY_TIES,
    )


WHY_EARLY = (
    "WMA is far ahead of SMA early, but EMA with alpha = 0.2 is ahead of WMA. What counts while the "
    "loss falls fast is how far back the weights lie: on average 4.5 intervals for SMA, 3.0 for WMA "
    "and 2.8 for EMA. Later, when there is more noise than progress, the order turns round."
)
WHY_DECAY = (
    "TIES averages, entry by entry, only the changes that agree with the majority's sign. These lie "
    "on one side of the mean, so that noise that a plain mean cancels stays in, and trimming small "
    "changes costs as well (the density that loses least is 1). Dropout is a plain mean with uneven "
    "weights, and is as good as one. Meta is better than SMA as it leans on newer snapshots; EMA and "
    "WMA, which it contains, do so more."
)
WHY_STABLE = "At least one of them is better than a plain mean here."
WHY_SLERP = "The loss is lowest at a t of a half or more."
WHY_TIES = (
    "Entries that are trimmed cost here: from a density of 0.4 on, the more are kept, the lower the "
    "loss, at every point and in both models. The papers' models are some 10,000 times as large, and "
    "more of their entries may be noise."
)


def _difference(figures: dict[str, Any], model: str, point: str, method: str, other: str) -> Interval:
    """By how much one method's loss is lower than another's, seed by seed."""
    found = figures["methods"][model][point]
    pairs = zip(found[method]["loss"], found[other]["loss"], strict=True)
    return interval([a - b for a, b in pairs])


def _by_method(found: Mapping[tuple[str, str, str], Interval]) -> str:
    methods = dict.fromkeys(method for *_, method in found)
    return "; ".join(
        f"{m} {_listed([d for (*_, other), d in found.items() if other == m], 4)}" for m in methods
    )


def _listed(intervals: Sequence[Interval], digits: int = 3) -> str:
    return ", ".join(each.shown(digits) for each in intervals)


def _means(values: Mapping[str, Any]) -> dict[str, float]:
    return {value: interval(gains["loss"]).mean for value, gains in values.items()}


def _best(values: Mapping[str, Any]) -> str:
    means = _means(values)
    return max(means, key=means.__getitem__)


def draw(figures: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(15, 6.4), layout="constrained")
    axes = figure.subplots(2, 6, width_ratios=(1, 1, 1, 1, 1.4, 1.4))
    for row, model in zip(axes, MODELS, strict=True):
        for axis, point in zip(row, POINTS, strict=False):
            _dots(axis, [_difference(figures, model, point, method, "sma") for method in METHODS])
            mean = interval(figures["methods"][model][point]["sma"]["loss"])
            axis.set_title(f"{model}, {point}\n(sma gains {mean.shown()})", fontsize=9)
        for axis in row[1:4]:
            axis.tick_params(labelleft=False)
        for axis, name in zip(row[4:], ("slerp t", "ties density"), strict=True):
            for point in list(POINTS)[1:]:
                found = figures["options"][model][point][name]
                means = [interval(gains["loss"]) for gains in found.values()]
                places = [float(value) for value in found]
                axis.errorbar(places, *zip(*means, strict=True), label=point, capsize=2)
            axis.axhline(0, color="black", linewidth=0.6)
            axis.set_title(f"{model}, {name.split()[0]}", fontsize=9)
            axis.set(xlabel=name.split()[1])
            axis.grid(alpha=0.3)
    axes[0][5].legend(fontsize=8)
    figure.supxlabel(
        "nats per byte: left, by how much a method is better than sma; right, gains", fontsize=10
    )
    return figure


def _dots(axis: Any, found: Sequence[Interval]) -> None:
    """A method a line, with its interval, against the plain mean."""
    means, halves = zip(*found, strict=True)
    axis.errorbar(means, range(len(METHODS)), xerr=halves, fmt="o", markersize=4, capsize=2)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set_yticks(range(len(METHODS)), METHODS)
    axis.invert_yaxis()
    axis.locator_params(axis="x", nbins=3)
    axis.grid(alpha=0.3, axis="x")
