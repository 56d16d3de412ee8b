"""Many candidates at each point, the best by held-out text: what choosing is worth, and among which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.papers.spec import Merge, Snapshot, Spec, Weights, merge
from benchmarks.papers.study import DECAY, LENGTHS, MODELS, Model, Study
from benchmarks.papers.verdict import Interval, Verdict, interval, says
from merge_callback.options import AUTO

TITLE = "The best of many candidates"

CONCLUSION = (
    "**The defaults leave little to choose.** In the stable phase the best of 29 merges by held-out "
    "text is a little ahead of `sma` of ten, by 5 % of its gain, and it is always the running average "
    "of 5 % width; among the windows and methods of snapshots alone the choice is worth 2 %. In the "
    "decay no choice is ahead of `ema` of ten. If one candidate is to be added to the defaults, it is "
    "that running average in the stable phase. Choosing on other text is nearly as good as choosing in "
    "hindsight, but with differences this small that is no reason to choose."
)

COUNTS, SPACING = (3, 6, 10, 15), 20
DEFAULT = 10
"""Snapshots of the callback's window."""

METHODS = ("sma", "wma", "ema", "wsm", "ties")
LAMBDAS = (0.25, 0.5, 1.0)
"""Of the extrapolation beyond the last merge."""

FAMILIES: dict[str, Callable[[str], bool]] = {
    "5 methods of the default's window": lambda name: name in {f"{m}-{DEFAULT}" for m in METHODS},
    "4 windows of sma": lambda name: name.startswith("sma-"),
    "4 windows of wsm": lambda name: name.startswith("wsm-"),
    "4 windows, 5 methods": lambda name: name in {f"{m}-{n}" for m in METHODS for n in COUNTS},
    "reversed and random orders": lambda name: name.endswith(("reversed", "random")),
    "extrapolations": lambda name: name.startswith("beyond"),
    "running averages": lambda name: name.startswith("power"),
    "all": lambda name: True,
}
"""What is chosen from."""


class Point(NamedTuple):
    """A step of a run, and the first step that a window may reach back to."""

    phase: str
    length: int
    step: int
    first: int


POINTS = [Point("stable", length, length, SPACING) for length in LENGTHS[1:]] + [
    Point("decay", length, round(length * (1 + DECAY * share)), length + SPACING)
    for length in LENGTHS[1:]
    for share in (0.5, 1.0)
]


def runs(study: Study, seed: int) -> list[Spec]:
    return study.standard(seed)


def measure(study: Study) -> dict[str, Any]:
    """Per model and point the losses of all candidates on both texts, a list over seeds at each place."""
    return {
        "points": [
            {**point._asdict(), "model": model, "losses": _losses(study, model, point)}
            for model in MODELS
            for point in POINTS
        ]
    }


def _losses(study: Study, model: Model, point: Point) -> dict[str, Any]:
    seeds = [_candidates(study, study.decay(model, seed, point.length), point) for seed in study.seeds]
    return {
        name: {part: [study.score(seed[name], part).loss for seed in seeds] for part in ("choose", "score")}
        for name in seeds[0]
    }


def _candidates(study: Study, line: Spec, point: Point) -> dict[str, Weights]:
    """The live weights and all candidates by name; windows as long as their phase allows."""
    step = study.steps(point.step)

    def steps(n: int, until: int) -> list[Snapshot]:
        fits = min(n, 1 + (until - point.first) // SPACING)
        return [line.at(study.steps(until - SPACING * i)) for i in reversed(range(fits))]

    found: dict[str, Weights] = {"live": line.at(step)}
    for n in COUNTS:
        for method in METHODS:
            found[f"{method}-{n}"] = merge(steps(n, point.step), method)
    window = steps(DEFAULT, point.step)
    for method in ("wma", "ema", "wsm"):
        found[f"{method}-{DEFAULT} reversed"] = merge(window, method, order="reversed")
    found[f"wma-{DEFAULT} random"] = merge(window, "wma", order="random")
    whole = point.step - point.first + SPACING
    back = min(SPACING * len(window), whole // 2 // SPACING * SPACING)  # a window, or half of a short phase
    earlier = steps(DEFAULT, point.step - back)
    for share in LAMBDAS:
        found[f"beyond sma-{DEFAULT} by {share}"] = _beyond(earlier, window, share)
    for kind in ("power.05", "power.10"):
        found[kind] = line.at(step, kind)
    return found


def _beyond(earlier: Sequence[Snapshot], window: Sequence[Snapshot], share: float) -> Merge:
    """The later mean, and on by a share of what it is away from the earlier one."""
    weights = dict.fromkeys([*earlier, *window], 0.0)
    for snapshot in window:
        weights[snapshot] += (1 + share) / len(window)
    for snapshot in earlier:
        weights[snapshot] -= share / len(earlier)
    return merge(list(weights), "weighted", weights=list(weights.values()))


def verdicts(figures: dict[str, Any]) -> list[Verdict]:
    return [
        _choice(figures, "stable"),
        _choice(figures, "decay"),
        _ties(figures),
        _windows_of_wsm(figures),
        _order(figures),
        _extrapolation(figures),
        _averages(figures),
    ]


def _choice(figures: dict[str, Any], phase: str) -> Verdict:
    """The best of all on the text for choices, against the default, on the other text."""
    gain = interval(over_default(figures, phase, FAMILIES["all"]))
    oracle = interval(over_default(figures, phase, FAMILIES["all"], "score"))
    share = _share(figures, phase)
    return Verdict(
        f"{phase.capitalize()}: the best of many merges by validation beats the default, {AUTO[phase]}.",
        "[NS] §2.5; [NU] §2.4",
        "the best of several is kept",
        f"{gain.shown(4)} nats ({oracle.shown(4)} if chosen in hindsight); better in {share:.0f} % of cases",
        says([gain.is_positive]),
        "" if gain.is_positive else WHY_CHOICE,
    )


def _ties(figures: dict[str, Any]) -> Verdict:
    """TIES against SMA in the decay."""
    by_end = {end: _against(figures, "ties-10", "sma-10", end) for end in (False, True)}
    verdict = says([each.is_positive for each in by_end.values()])
    newer = ", ".join(f"{m} {_against(figures, f'{m}-10', 'sma-10').shown(4)}" for m in ("ema", "wma"))
    return Verdict(
        "In the decay TIES is better than a plain mean.",
        "[PG] Tab. 3",
        "up to +0.8 points",
        f"halfway {by_end[False].shown(4)} nats over sma, at the end {by_end[True].shown(4)}; on average "
        f"{newer}",
        verdict,
        "" if verdict == "holds" else WHY_TIES,
    )


def _windows_of_wsm(figures: dict[str, Any]) -> Verdict:
    found = {
        p: interval(over_default(figures, p, FAMILIES["4 windows of wsm"], "choose", "live")) for p in AUTO
    }
    ahead = interval(over_default(figures, "stable", FAMILIES["4 windows of wsm"]))
    holds = [found["stable"].is_positive, found["decay"].mean < found["stable"].mean / 3]
    return Verdict(
        "The best of several windows with 1-sqrt weights is far ahead of the last weights, less in a decay.",
        "[NS] §2.5",
        "+2 to +4 points",
        f"stable {found['stable'].shown()} nats over live ({ahead.shown()} over sma-10), decay "
        f"{found['decay'].shown()}",
        says(holds),
        "" if all(holds) else WHY_WSM,
    )


def _order(figures: dict[str, Any]) -> Verdict:
    names = [f"{m}-{DEFAULT} reversed" for m in ("wma", "ema", "wsm")]
    found = {p: [_against(figures, name, name.split()[0], phase=p) for name in names] for p in AUTO}
    chosen = interval(over_default(figures, "stable", FAMILIES["reversed and random orders"]))
    holds = [each.is_positive for phase in found.values() for each in phase]
    return Verdict(
        "Weights in reversed or random order are worth trying.",
        "[NU] §2.4",
        "among the candidates",
        "reversed against forward, "
        + "; ".join(f"{phase}: {_named(names, each)}" for phase, each in found.items())
        + f" nats; the best of them against the default, stable: {chosen.shown(4)}",
        says(holds),
        "" if all(holds) else WHY_ORDER,
    )


def _named(names: Sequence[str], found: Sequence[Interval]) -> str:
    pairs = zip(names, found, strict=True)
    return ", ".join(f"{name.split('-')[0]} {each.shown(4)}" for name, each in pairs)


def _extrapolation(figures: dict[str, Any]) -> Verdict:
    found = {
        p: interval(over_default(figures, p, FAMILIES["extrapolations"], "choose", "sma-10")) for p in AUTO
    }
    holds = [each.is_positive for each in found.values()]
    return Verdict(
        "Going on beyond the last merge, by a share chosen on held-out text, is better than the merge.",
        "[EM]",
        "better",
        "; ".join(f"{phase} {each.shown(4)} nats over sma" for phase, each in found.items()),
        says(holds),
        "" if all(holds) else WHY_BEYOND,
    )


def _averages(figures: dict[str, Any]) -> Verdict:
    found = {
        f"{kind}, {phase}": _against(figures, kind, "sma-10", phase=phase)
        for phase in AUTO
        for kind in ("power.05", "power.10")
    }
    holds = [each.is_positive for each in found.values()]
    return Verdict(
        "A running average of every step is better than a mean of ten snapshots.",
        "EDM2, eq. 1 to 17",
        "not compared there",
        "; ".join(f"{name} {each.shown(4)}" for name, each in found.items()) + " nats",
        says(holds),
        "" if all(holds) else WHY_AVERAGES,
    )


WHY_CHOICE = (
    "The default is within half a thousandth of a nat of the best of all merges even in hindsight, "
    "and differences as small as those among the best do not carry over from one text to another."
)
WHY_TIES = (
    "TIES averages, entry by entry, only the changes that agree with the majority's sign. These lie "
    "on one side of the mean, so that noise that a plain mean cancels stays in."
)
WHY_WSM = (
    "The gain over the live weights is there, but 1-sqrt weights lie on the oldest snapshots, which "
    "are the worst ones in a run as short as this: a plain mean is as good in the stable phase, and "
    "better in the decay."
)
WHY_ORDER = (
    "An order matters by where it puts the weight. Turned round, WMA and EMA lean on the oldest "
    "snapshots and lose; WSM, which leans on these, wins in the decay. A method that leans to the "
    "other side is the same candidate."
)
WHY_BEYOND = (
    "The difference of two means of ten snapshots holds the noise of both, and going on along it adds "
    "more noise than progress: the best share is the smallest one that was tried."
)
WHY_AVERAGES = (
    "The narrow average (5 % of the steps so far) is ahead at a constant rate, where a window of ten "
    "snapshots is too short. In the decay it is about as good as the mean of ten, and the wide one "
    "(10 %) reaches back into the stable phase."
)


def over_default(
    figures: dict[str, Any],
    phase: str,
    among: Callable[[str], bool],
    chosen_on: str = "choose",
    other: str | None = None,
) -> list[float]:
    """By how much what is chosen is better than the default (or another one), per seed, over the points.

    Args:
        figures: of ``measure``.
        phase: whose points count.
        among: whether a candidate may be chosen, by its name.
        chosen_on: the text; the gain is always told on ``"score"``.
        other: what it is compared with.
    """
    points = [point for point in figures["points"] if point["phase"] == phase]
    other = other or f"{AUTO[phase]}-{DEFAULT}"
    gains = [_chosen(point["losses"], among, chosen_on, other) for point in points]
    return [sum(seed) / len(gains) for seed in zip(*gains, strict=True)]


def _chosen(losses: dict[str, Any], among: Callable[[str], bool], text: str, other: str) -> list[float]:
    """At one point, per seed."""
    names = [name for name in losses if among(name)]
    best = [
        min(names, key=lambda name: losses[name][text][seed]) for seed in range(len(losses["live"]["score"]))
    ]
    scores = [losses[name]["score"][seed] for seed, name in enumerate(best)]
    return [a - b for a, b in zip(losses[other]["score"], scores, strict=True)]


def _share(figures: dict[str, Any], phase: str) -> float:
    """Percent of the choices among all that are better than the default on the text for figures."""
    other = f"{AUTO[phase]}-{DEFAULT}"
    points = [point["losses"] for point in figures["points"] if point["phase"] == phase]
    gains = [gain for losses in points for gain in _chosen(losses, FAMILIES["all"], "choose", other)]
    return 100 * sum(gain > 0 for gain in gains) / len(gains)


def _against(
    figures: dict[str, Any], name: str, other: str, at_end: bool | None = None, phase: str = "decay"
) -> Interval:
    """By how much one candidate is better than another, over the points, seed by seed."""
    points = [
        point["losses"]
        for point in figures["points"]
        if point["phase"] == phase
        and (at_end is None or at_end == (point["step"] == point["length"] * (1 + DECAY)))
    ]
    pairs = [zip(losses[other]["score"], losses[name]["score"], strict=True) for losses in points]
    gains = [[a - b for a, b in pair] for pair in pairs]
    return interval([sum(seed) / len(gains) for seed in zip(*gains, strict=True)])


def draw(figures: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 9), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row", height_ratios=(1, 3))
    for (above, below), phase in zip(axes.T, AUTO, strict=True):
        for shift, text in enumerate(("choose", "score")):
            found = [interval(over_default(figures, phase, among, text)) for among in FAMILIES.values()]
            label = "chosen on other text" if text == "choose" else "chosen in hindsight"
            _bars(above, found, 0.35, 0.35 * (shift - 0.5), label)
        above.set_yticks(range(len(FAMILIES)), [f"best of {name}" for name in FAMILIES])
        above.set(title=f"{phase}: against {AUTO[phase]}-{DEFAULT}, the default")
        names = [name for name in figures["points"][0]["losses"] if name != "live"]
        _bars(below, [_against(figures, name, f"sma-{DEFAULT}", phase=phase) for name in names], 0.7)
        below.set_yticks(range(len(names)), names, fontsize=8)
        below.set(title=f"{phase}: each against sma-{DEFAULT}", xlabel="nats per byte better")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    for axis in axes[:, 0]:
        axis.invert_yaxis()
    return figure


def _bars(axis: Any, found: list[Interval], height: float, shift: float = 0, label: str = "") -> None:
    places = [k + shift for k in range(len(found))]
    axis.barh(places, [f.mean for f in found], height, xerr=[f.half for f in found], label=label)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.locator_params(axis="x", nbins=5)
    axis.grid(alpha=0.3, axis="x")
