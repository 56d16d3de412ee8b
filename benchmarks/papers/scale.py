"""The gain of the merge against the size of the model and the learning rate; experts against dense.

Per cent are of the loss: 100 · (newest snapshot's − merge's) / newest snapshot's, in nats per byte; the paper
and the Blog count benchmarks' scores. Gains are means over three moments of a run, each over its newest
snapshot. Two windows are measured: one that is the same for all runs, and one that is chosen for each run on
the text ``choose``; what is told is of the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.charts import bars, line
from benchmarks.papers.sizes import LATE, MOMENTS, PAIRS, RATE, RATES, dense, experts, gain, specs
from benchmarks.papers.spec import Spec
from benchmarks.papers.study import MODELS, Study
from benchmarks.papers.verdict import Verdict, interval, says

TITLE = "Sizes, learning rates, experts"

CONCLUSION = """\
Merging pays at each size and each learning rate that was tried, most at large models and high rates. At one
rate for all sizes the gain grows fast with the size, because that rate is low for the small models; at
rates that suit each of them it grows slowly. It grows with the rate up to about the one at which the newest
snapshot is best. The rate at which the merge is best is the same or the next higher one: choose it as if
nothing were merged. Models with experts gain a little more than dense ones with as many active parameters,
by less than the Blog's percentages differ.
"""

SEEDS = 3


def runs(study: Study, seed: int) -> list[Spec]:
    return specs(study, seed)


def measure(study: Study) -> dict[str, Any]:
    def over_seeds(spec: Any, moments: Sequence[int] = MOMENTS) -> dict[str, Any]:
        found = [gain(study, spec(seed), moments) for seed in study.seeds]
        return {name: [each[name] for each in found] for name in found[0]}

    return {
        "sizes": {
            width: {rate: over_seeds(lambda s, w=width, r=rate: dense(study, s, w, r)) for rate in rates}
            for width, rates in RATES.items()
        },
        "pairs": {
            f"width {width}, step {moments[-1]}": {
                "dense": over_seeds(lambda s, w=width: dense(study, s, w, PAIRS[w]), moments),
                "moe": over_seeds(lambda s, w=width: experts(study, s, w), moments),
            }
            for width, moments in ((32, MOMENTS), (32, LATE), (64, MOMENTS))
        },
    }


def verdicts(figures: dict[str, Any]) -> list[Verdict]:
    return [_every_size(figures), _with_rate(figures), _best_rate(figures), _pairs(figures)]


def _every_size(figures: dict[str, Any]) -> Verdict:
    cells = [_at_best(rates) for rates in figures["sizes"].values()]
    same = [rates[str(RATE)] for rates in figures["sizes"].values()]
    sizes = [cell["parameters"][0] for cell in same]
    trends = [
        interval(_slopes(np.log10(sizes), [cell["chosen, percent"] for cell in each]))
        for each in (cells, same)
    ]
    holds = [value > 0 for each in (*cells, *same) for value in each["chosen"]]
    listed = ", ".join(
        f"{size / 1000:.0f}k {_percent(cell['chosen, percent'])}"
        for size, cell in zip(sizes, cells, strict=True)
    )
    return Verdict(
        "Merging in the stable phase gains at every size.",
        "[PMA] Fig. 1",
        "at all sizes up to 10B/100B parameters",
        f"{listed} of the loss, a factor of {max(sizes) / min(sizes):.0f} in parameters, each at the rate "
        f"that suits it; {trends[0].shown(1)} for each tenfold ({trends[1].shown(1)} at {RATE:g} for all)",
        says(holds),
        "" if all(holds) else "The merge of some seed is worse than its newest snapshot.",
    )


def _at_best(rates: dict[str, Any]) -> dict[str, list[Any]]:
    """The figures of a width, each seed at the rate whose newest snapshot is best on the text ``choose``."""
    found = [rates[rate] for rate in _chosen(rates, "loss to choose by")]
    return {name: [cell[name][seed] for seed, cell in enumerate(found)] for name in found[0]}


def _with_rate(figures: dict[str, Any]) -> Verdict:
    trends, listed, doublings = [], [], []
    for width, cells in _swept(figures).items():
        steps = np.log2([float(rate) for rate in cells])
        trends.append(interval(_slopes(steps, [cell["chosen"] for cell in cells.values()])))
        means = [interval(cell["chosen"]).mean for cell in cells.values()]
        doublings += [higher > lower for lower, higher in pairwise(means)]
        found = ", ".join(f"{interval(c['chosen']).shown()} at {float(r):g}" for r, c in cells.items())
        listed.append(f"width {width}: {found}, {trends[-1].shown()} for each doubling")
    holds = [*(trend.is_positive for trend in trends), *doublings]
    return Verdict(
        "The higher the constant learning rate, the more a merge gains.",
        "[PMA] App. C (left open)",
        "no figure",
        "; ".join(listed) + " (nats per byte)",
        says(holds),
        "" if all(holds) else WHY_HIGHER,
    )


WHY_HIGHER = """\
The gain grows with each doubling up to about the rate at which the newest snapshot is best. Beyond it, at
width 64, newest snapshot and merge become worse by as much, and the gain stays where it is.
"""


def _best_rate(figures: dict[str, Any]) -> Verdict:
    listed, shifts = [], []
    for width, cells in _swept(figures).items():
        live, merged = _chosen(cells, "loss to choose by"), _chosen(cells, "merged loss to choose by")
        more = [_merged(cells[b], seed) for seed, b in enumerate(merged)]
        less = [_merged(cells[a], seed) for seed, a in enumerate(live)]
        difference = interval([a - b for a, b in zip(less, more, strict=True)])
        shifts += [float(b) / float(a) for a, b in zip(live, merged, strict=True)]
        listed.append(
            f"width {width}: the newest snapshot is best at {_rates(live)}, the merge at {_rates(merged)}, "
            f"where it is {difference.shown()} nats better than at the former"
        )
    holds = 2 * sum(shift > 1 for shift in shifts) > len(shifts)
    return Verdict(
        "A run that will be merged may take a higher learning rate than one that will not.",
        "[PMA] App. C (left open)",
        "no figure",
        f"higher in {sum(shift > 1 for shift in shifts)} of {len(shifts)} cases, lower in "
        f"{sum(shift < 1 for shift in shifts)}; " + "; ".join(listed),
        says([holds]),
        "" if holds else WHY_RATE,
    )


WHY_RATE = """\
The merge takes away a part of the noise of a high learning rate, but not the harm that it does. In most
runs newest snapshot and merge are best at the same one of rates that are factors of two apart (chosen for
each seed on the text for choices), in the others the merge is best at the next higher one.
"""


def _pairs(figures: dict[str, Any]) -> Verdict:
    listed, differences = [], []
    for name, pair in figures["pairs"].items():
        shares = zip(pair["moe"]["chosen, percent"], pair["dense"]["chosen, percent"], strict=True)
        differences.append(interval([a - b for a, b in shares]))
        found = [
            " against ".join(_percent(pair[model][of]) for model in ("moe", "dense"))
            for of in ("chosen, percent", "chosen, percent of accuracy")
        ]
        listed.append(
            f"{name}: {found[0]} of the loss (by {differences[-1].shown(1)}), {found[1]} of the accuracy"
        )
    holds = [difference.is_positive for difference in differences]
    return Verdict(
        "A model with experts gains more by merging than a dense one with as many active parameters.",
        "Blog",
        "2 to 5 % against 1 to 3 % (of benchmarks' scores)",
        "experts against dense, " + ". ".join(listed),
        says(holds),
        "" if all(holds) else WHY_PAIRS,
    )


WHY_PAIRS = """\
The experts' merges gain more on average in each pair, but the difference is a small part of the gain, and
most of the intervals reach below 0. The percentages are not the Blog's: those are of benchmarks' scores,
these of a loss, in runs so short that a merge is worth more to both kinds than what the Blog says of
experts.
"""


def _swept(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The widths that have several learning rates."""
    return {width: cells for width, cells in figures["sizes"].items() if len(cells) > 2}


def _slopes(places: Sequence[float], cells: Sequence[Sequence[float]]) -> list[float]:
    """Of the least-squares line through one figure per place; one slope for each seed."""
    return [float(np.polyfit(places, values, 1)[0]) for values in zip(*cells, strict=True)]


def _chosen(cells: dict[str, Any], by: str) -> list[str]:
    """The learning rate with the least loss on the text for choices; one for each seed."""
    seeds = range(len(next(iter(cells.values()))[by]))
    return [min(cells, key=lambda rate, s=seed: cells[rate][by][s]) for seed in seeds]  # type: ignore[misc]


def _merged(cell: dict[str, Any], seed: int) -> float:
    return float(cell["loss"][seed] - cell["chosen"][seed])


def _rates(found: Sequence[str]) -> str:
    return " or ".join(f"{rate:g}" for rate in sorted({float(each) for each in found}))


def _percent(values: Sequence[float]) -> str:
    return f"{interval(values).shown(1)} %"


def draw(figures: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 9), layout="constrained")
    (sizes, rates), (losses, pairs) = figure.subplots(2, 2)
    _draw_sizes(sizes, figures)
    _draw_rates(rates, losses, figures)
    _draw_pairs(pairs, figures)
    return figure


def _draw_sizes(axes: Axes, figures: dict[str, Any]) -> None:
    for label, cells in (
        ("each at its best rate", [_at_best(rates) for rates in figures["sizes"].values()]),
        (f"all at {RATE:g}", [rates[str(RATE)] for rates in figures["sizes"].values()]),
    ):
        line(axes, [c["parameters"][0] for c in cells], [c["chosen, percent"] for c in cells], label)
    axes.set(
        title="Gain against size",
        xscale="log",
        xlabel="parameters of the dense model",
        ylabel="gain (per cent of the loss)",
        ylim=(0, None),
    )
    axes.legend()


def _draw_rates(gains: Axes, losses: Axes, figures: dict[str, Any]) -> None:
    for width, cells in _swept(figures).items():
        rates = [float(rate) for rate in cells]
        line(gains, rates, [cell["chosen"] for cell in cells.values()], f"width {width}")
        for name, style in (("newest snapshot", "--"), ("merge", "-")):
            found = [_losses(cell, name) for cell in cells.values()]
            line(losses, rates, found, f"{name}, width {width}", style)
    every = sorted({float(rate) for cells in _swept(figures).values() for rate in cells})
    gains.set(title="Gain against the learning rate", ylabel="gain (nats per byte)", ylim=(0, None))
    losses.set(title="Loss against the learning rate", ylabel="held-out loss (nats per byte)")
    for axes in (gains, losses):
        axes.set(xscale="log", xlabel="peak learning rate")
        axes.set_xticks(every, [f"{rate:g}" for rate in every])
        axes.minorticks_off()
        axes.legend()


def _losses(cell: dict[str, Any], name: str) -> list[float]:
    seeds = range(len(cell["loss"]))
    return [_merged(cell, seed) if name == "merge" else cell["loss"][seed] for seed in seeds]


def _draw_pairs(axes: Axes, figures: dict[str, Any]) -> None:
    pairs = figures["pairs"]
    groups = {model: [pair[model]["chosen, percent"] for pair in pairs.values()] for model in MODELS}
    bars(axes, [name.replace(", ", ",\n") for name in pairs], groups)
    axes.set(
        title="Dense and experts, as many active parameters",
        ylabel="gain (per cent of the loss)",
        xlabel="width of both, step of the newest merge",
    )
    axes.margins(y=0.2)
    axes.legend(loc="upper right", ncols=2)
