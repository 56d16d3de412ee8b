"""A constant learning rate with a merge against forks that anneal: all along, by length, by learning rate."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers import rates
from benchmarks.papers.curves import band
from benchmarks.papers.paired import difference, extent, listed, ratio
from benchmarks.papers.spec import Merge, Spec
from benchmarks.papers.study import DECAY, MODELS, Model, Study
from benchmarks.papers.verdict import Interval, Verdict, interval, says

TITLE = "A merge at a constant learning rate, and what annealing would give"

CONCLUSION = """\
Validate the merge while the learning rate is constant: it shows most of what a decay would give, long
before there is one, and it compares runs fairly whose learning rates differ, which the live loss does not.
Don't take it for the final score: add what an earlier decay of the same run gained beyond the merge of its
time ([forecast](forecast.md)). To ship a model, decay it; a merge replaces only the first steps of a
decay."""

POINTS = (400, 800, 1200, 1600, 2000, 2400)
"""Steps at which forks leave to anneal, by 1-sqrt, for a quarter as many."""
LEAVE, SHORT = 1600, (40, 80, 160)
"""Where shorter forks of the dense model leave, and their lengths."""
WITHIN = range(40, round(LEAVE * DECAY) + 1, 40)
"""Steps of a decay at which it is compared with the run that goes on."""
N, SPACINGS = 10, (10, 20, 30)
"""Snapshots of a merge, and the intervals that are chosen from, at each point, on another text."""

NEAR = 0.03
"""A forecast no further off is accurate: a third of what annealing adds to a merge, nats per byte."""

Figures = dict[str, Any]


def runs(study: Study, seed: int) -> list[Spec]:
    return [
        *(constant(study, model, seed) for model in MODELS),
        *(study.decay(model, seed, point) for model in MODELS for point in POINTS),
        *(short(study, seed, length) for length in SHORT),
        *(rates.decay(study, seed, rate) for rate in rates.RATES),
    ]


def constant(study: Study, model: Model, seed: int) -> Spec:
    """The trunk, and on at the same learning rate for as long as its last decay."""
    return study.trunk(model, seed).fork(study.steps(2400), study.steps(600))


def short(study: Study, seed: int, length: int) -> Spec:
    """A shorter decay."""
    return study.trunk("dense", seed).fork(study.steps(LEAVE), study.steps(length), schedule="1-sqrt")


def measure(study: Study) -> Figures:
    return {
        "along": {model: {p: _along(study, model, p) for p in POINTS} for model in MODELS},
        "within": {model: {n: _within(study, model, n) for n in WITHIN} for model in MODELS},
        "short": {n: _short(study, n) for n in (*SHORT, round(LEAVE * DECAY))},
        "rates": {rate: _rate(study, rate) for rate in rates.RATES},
    }


def _along(study: Study, model: Model, point: int) -> Figures:
    """The live model, the merge and the annealed fork, after as many steps; the merge before them, too."""
    end = study.steps(point * (1 + DECAY))
    lines = [constant(study, model, seed) for seed in study.seeds]
    return {
        "before": [_merged(study, line, study.steps(point)) for line in lines],
        "live": [study.score(line.at(end)).loss for line in lines],
        "merge": [_merged(study, line, end) for line in lines],
        "annealed": [study.score(study.decay(model, seed, point).at(end)).loss for seed in study.seeds],
    }


def _merged(study: Study, line: Spec, step: int) -> float:
    """The loss of the merge whose spacing is the best one on the text for choices."""
    windows = [line.window(step, N, study.steps(spacing)) for spacing in SPACINGS]
    return study.score(study.best(windows)).loss


def _within(study: Study, model: Model, own: int) -> Figures:
    """The same in the course of a decay, with the default spacing."""
    step = study.steps(LEAVE + own)
    lines = [constant(study, model, seed) for seed in study.seeds]
    windows: list[Merge] = [line.window(step, N, study.steps(SPACINGS[1])) for line in lines]
    decays = [study.decay(model, seed, LEAVE) for seed in study.seeds]
    return {
        "live": [study.score(line.at(step)).loss for line in lines],
        "merge": [study.score(window).loss for window in windows],
        "annealed": [study.score(decay.at(step)).loss for decay in decays],
    }


def _short(study: Study, length: int) -> Figures:
    """What a decay of some steps ends with, and the merge before it."""
    lines = [study.trunk("dense", seed) for seed in study.seeds]
    forks = [short(study, seed, length) for seed in study.seeds]
    return {
        "before": [_merged(study, line, study.steps(LEAVE)) for line in lines],
        "annealed": [study.score(fork.at(fork.end)).loss for fork in forks],
    }


def _rate(study: Study, rate: float) -> Figures:
    lines, end = [rates.trunk(study, seed, rate) for seed in study.seeds], study.steps(1000)
    return {
        "live": [study.score(line.at(end)).loss for line in lines],
        "merge": [_merged(study, line, end) for line in lines],
        "annealed": [study.score(rates.decay(study, seed, rate).at(end)).loss for seed in study.seeds],
    }


def verdicts(figures: Figures) -> list[Verdict]:
    return [_as_good(figures), _at_first(figures), _predicts(figures), _ranks(figures)]


def _as_good(figures: Figures) -> Verdict:
    cells = [figures["along"][model][str(point)] for model in MODELS for point in POINTS]
    shares = [_share(cell) for cell in cells]
    behind = [difference(cell["merge"], cell["annealed"]) for cell in cells]
    holds = [each.mean >= 90 for each in shares]
    worth = {n: difference(cell["before"], cell["annealed"]) for n, cell in figures["short"].items()}
    return Verdict(
        "At a constant learning rate the merge is about as good as a fork annealed from there.",
        "[PMA] Fig. 3; Blog",
        "comparable",
        f"after as many steps it has {extent(shares, 0, ' %', sign=False)} of what annealing brings, and is "
        f"{extent(behind)} nats behind (6 points, 2 models); the merge at step {LEAVE} less a decay's end: "
        f"{', '.join(f'{each.shown()} ({n} steps)' for n, each in worth.items())}",
        says(holds),
        "" if all(holds) else WHY_BEHIND,
    )


def _share(cell: Figures) -> Interval:
    """Of the annealed fork's advantage over the live model, what the merge has, percent."""
    merged, annealed = (
        [live - other for live, other in zip(cell["live"], cell[name], strict=True)]
        for name in ("merge", "annealed")
    )
    return ratio(merged, annealed)


def _at_first(figures: Figures) -> Verdict:
    leads = {
        model: {
            n: difference(cell["annealed"], cell["merge"]) for n, cell in figures["within"][model].items()
        }
        for model in MODELS
    }
    firsts = [next(iter(lead.values())) for lead in leads.values()]
    until = {
        model: next((int(n) for n, each in lead.items() if each.mean < 0), 0) for model, lead in leads.items()
    }
    holds = [each.is_positive for each in firsts]
    return Verdict(
        "At first the merge is ahead of the model that anneals.",
        "[PMA] Fig. 3",
        "ahead early in the annealing",
        f"{listed(dict(zip(leads, firsts, strict=True)))} nats after {WITHIN[0]} of {WITHIN[-1]} steps; "
        f"behind from step {' and '.join(map(str, until.values()))} on",
        says(holds),
        "" if all(holds) else WHY_FIRST,
    )


def _predicts(figures: Figures) -> Verdict:
    plain, corrected = (_errors(figures, own) for own in (False, True))
    holds = [max(abs(each.mean) for each in errors) < NEAR for errors in (plain, corrected)]
    return Verdict(
        "The merge predicts what annealing would give.",
        "[PMA] §4.1, Fig. 3",
        "an accurate prediction",
        f"the merge before the decay is off by {extent(plain)} nats; less what an earlier fork of the run "
        f"gained beyond the merge of its time, by {extent(corrected)}",
        says(holds),
        "" if all(holds) else WHY_PREDICTS,
    )


def _errors(figures: Figures, own: bool) -> list[Interval]:
    """Of the merge as a forecast from the second point on; of the third on, corrected by the one before."""
    found = []
    for model in MODELS:
        cells = [figures["along"][model][str(point)] for point in POINTS[1:]]
        gaps = [[b - a for a, b in zip(c["annealed"], c["before"], strict=True)] for c in cells]
        if own:
            found += [difference(gap, earlier) for earlier, gap in pairwise(gaps)]
        else:
            found += [interval(gap) for gap in gaps]
    return found


def _ranks(figures: Figures) -> Verdict:
    best = {
        name: [
            min(rates.RATES, key=lambda r: figures["rates"][f"{r}"][name][s]) for s in range(_seeds(figures))
        ]
        for name in ("live", "merge", "annealed")
    }
    right = {
        name: sum(a == b for a, b in zip(best[name], best["annealed"], strict=True))
        for name in ("live", "merge")
    }
    spread = {name: [interval(figures["rates"][f"{rate}"][name]) for rate in rates.RATES] for name in best}
    holds = [right["merge"] == _seeds(figures), right["merge"] > right["live"]]
    return Verdict(
        "The merge tells which of several runs is the best, without annealing them.",
        "Blog; [NS] §2.5",
        "no annealing needed to compare",
        f"of three learning rates the merge names the best one after annealing for {right['merge']} of "
        f"{_seeds(figures)} seeds, the live loss for {right['live']}; losses by rate: "
        + "; ".join(f"{n} {', '.join(e.shown(sign=False) for e in each)}" for n, each in spread.items()),
        says(holds),
        "" if all(holds) else WHY_RANKS,
    )


def _seeds(figures: Figures) -> int:
    return len(figures["rates"][f"{rates.RATES[0]}"]["live"])


WHY_BEHIND = (
    "Early in training the two are equal: there the merge still gains from what it averages, and a short "
    "decay has little time. Later the merge keeps about two thirds to three quarters of what annealing "
    "brings. It removes the noise that the learning rate keeps up, which is what the first few percent of "
    "a decay do: a decay of 40 steps ends above the merge, one of 80 below it. But the loss goes on "
    "falling in a longer decay, since at a small rate the model learns what the noise had covered, and no "
    "average of earlier snapshots holds that; [forecast](forecast.md) tries other windows and methods. "
    "[PMA] compares scores on benchmarks; ours is the loss on held-out text, which shows smaller "
    "differences."
)
WHY_FIRST = "The merge is ahead on average, but the interval over these seeds reaches down to 0."
WHY_PREDICTS = (
    "The merge before a decay does not contain what the decay learns (the row above), so it is too "
    "pessimistic, and always by about as much. An earlier fork of the same run tells by how much; only a "
    "fork at step 400 is too early for that. Corrected by the fork before, the forecast is several times "
    "as good."
)
WHY_RANKS = (
    "Two of the rates end close together after annealing, closer than the merges can tell them apart with "
    "certainty; they tell it more often than the live losses, which favour the lower rate because it "
    "makes less noise."
)

STYLES = {
    "live": ("tab:blue", "constant rate"),
    "merge": ("tab:orange", "constant rate, merge of ten"),
    "annealed": ("tab:green", "annealed"),
}


def draw(figures: Figures) -> Figure:
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    for row, model in zip(figure.subplots(2, 2), MODELS, strict=True):
        along, within = figures["along"][model], figures["within"][model]
        steps = [round(point * (1 + DECAY)) for point in POINTS]
        _lines(row[0], steps, [along[str(point)] for point in POINTS])
        row[0].set(title=f"{model}: a fifth of the steps annealed, or none", xlabel="total steps")
        _lines(row[1], [LEAVE + n for n in WITHIN], [within[str(n)] for n in WITHIN])
        row[1].set(title=f"{model}: in the course of one decay", xlabel="step")
    return figure


def _lines(axis: Axes, steps: list[int], cells: list[Figures]) -> None:
    for name, (colour, label) in STYLES.items():
        band(axis, steps, [cell[name] for cell in cells], color=colour, label=label)
    axis.set(ylabel="held-out loss, nats per byte")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
