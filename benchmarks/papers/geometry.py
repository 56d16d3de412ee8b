"""Why a merge is better: the loss on a plane of weights, and its second derivatives between snapshots.

Let θ_1 … θ_k be the snapshots, w_i = 1/k, θ̄ = Σ w_i θ_i the merge, θ* any point, δ_i = θ_i − θ*, and g and H
the gradient and the Hessian of the loss L at θ*. To second order L(θ_i) = L(θ*) + gᵀδ_i + ½ δ_iᵀHδ_i. The
weights sum to 1, so g cancels in the *gain over the mean*, whatever θ* is:

    Σ w_i L(θ_i) − L(θ̄)  ≈  ½ [Σ_i w_i δ_iᵀHδ_i − Σ_ij w_i w_j δ_iᵀHδ_j]
                          =  1/(2k²) [(k−1) Σ_i δ_iᵀHδ_i − Σ_{i≠j} δ_iᵀHδ_j]                              (a)
                          =  1/(2k²) Σ_{i<j} (θ_i − θ_j)ᵀH(θ_i − θ_j)                                     (b)

[PMA] eq. 15 says that the bracket in (a) is positive, with θ* at an optimum, where g = 0:

    Σ_{i≠j} δ_iᵀHδ_j  <  (k−1) Σ_i δ_iᵀHδ_i.

Divided by its right side it reads ρ < 1; ρ is the mean cross term over the mean diagonal term, that is, how
much the deviations have in common. The share of the mean rise Σ w_i L(θ_i) − L(θ*) that merging takes away
is (1 − ρ)(k−1)/k to second order: negative correlation (ρ < 0) is not needed, and by (b) ρ < 1 is true of
any H that is positive definite on the differences of snapshots.

Here θ* is first the merge (then the δ_i sum to 0, and ρ = −1/(k−1) by construction: this checks the formula,
not the claim), and then the end of the decay that leaves the trunk at the newest snapshot, which is the
nearest thing to the optimum below the window. What a user gains is the *gain over the newest snapshot*,
L(θ_k) − L(θ̄) ≈ gᵀδ_k + ½ δ_kᵀHδ_k with θ* at the merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.charts import bars, plane
from benchmarks.papers.curvature import Landscape
from benchmarks.papers.spec import Spec
from benchmarks.papers.study import LENGTHS, MODELS, Model, Study
from benchmarks.papers.verdict import Verdict, interval, says

TITLE = "The geometry behind the gain"

CONCLUSION = """\
Snapshots at a constant learning rate lie around the bottom of a bowl, and the merge lies near its bottom.
The gain over the *mean* of the snapshots follows from the curvature along their differences, and is there
wherever the loss curves upwards between them, in the decay, too. What a user gets is the gain over the
*newest* snapshot, and that is less by what the newest is better than the mean: in the decay almost nothing
is left. So merge where snapshots are equally good and far apart, which is at a constant learning rate, and
do not take the merge for the optimum: a good part of the way down is common to all snapshots, and no
average of them takes it away.
"""

CROPS = 0.375
"""Share of a score's held-out crops; losses and derivatives are both of these."""

LAST, SPACING = 10, 20
"""Snapshots of a window, and steps between them."""

PLANE = 100
"""Steps between the three snapshots of the plane."""

GRID, MARGIN = 11, 0.8
"""Points of the plane per axis, and its reach, in the distance of the first snapshot from the last."""


def runs(study: Study, seed: int) -> list[Spec]:
    return study.standard(seed)


def measure(study: Study) -> dict[str, Any]:
    landscapes = {model: _landscape(study, model) for model in MODELS}
    return {
        "windows": {
            model: {
                when: _by_name([_window(study, landscapes[model], model, when, seed) for seed in study.seeds])
                for when in WINDOWS
            }
            for model in MODELS
        },
        "planes": {
            model: _by_name([_plane(study, landscapes[model], model, seed) for seed in study.seeds])
            for model in MODELS
        },
    }


WINDOWS = {**{f"step {length}": length for length in LENGTHS}, "decay": LENGTHS[-1]}
"""Windows that end at a step of the trunk, and one that ends with the longest decay."""


def _landscape(study: Study, model: Model) -> Landscape:
    return Landscape(study.trunk(model, study.seeds[0]), max(32, round(study.size.crops * CROPS)))


def _window(study: Study, at: Landscape, model: Model, when: str, seed: int) -> dict[str, float]:
    """The two sides of the formula for one window, and what is measured."""
    decay = study.decay(model, seed, WINDOWS[when])
    step = decay.end if when == "decay" else decay.begin
    window = decay.window(step, LAST, study.steps(SPACING))
    states, merged = [study.weights(part) for part in window.parts], study.weights(window)
    losses, least = torch.tensor([at.loss(state) for state in states]).double(), at.loss(merged)
    here = at.around(merged, states)
    found = {
        "mean gain": float(losses.mean()) - least,
        "mean gain by the formula": here.mean_gain,
        "newest gain": float(losses[-1]) - least,
        "newest gain by the formula": float(here.rises[-1]),
        "positive pairs": here.positive_pairs,
    }
    if when == "decay":
        return found
    annealed = study.weights(decay.at(decay.end))
    below = at.around(annealed, states)
    left, right = below.sides
    rise = float(losses.mean()) - at.loss(annealed)
    return {
        **found,
        "left side": left,
        "right side": right,
        "correlation": left / right,
        "mean gain by the formula at the optimum": below.mean_gain,
        "rise above the optimum": rise,
        "rise by the formula": float(below.rises.mean()),
        "share of the rise": found["mean gain"] / rise,
    }


def _plane(study: Study, at: Landscape, model: Model, seed: int) -> dict[str, Any]:
    """The loss on the plane through three snapshots: at these, at their merge, and on a grid."""
    window = study.trunk(model, seed).window(study.steps(LENGTHS[-1]), 3, study.steps(PLANE))
    states, merged = [study.weights(part) for part in window.parts], study.weights(window)
    losses, least, found = (
        [at.loss(state) for state in states],
        at.loss(merged),
        at.plane(merged, states, GRID, MARGIN),
    )
    mean = float(np.mean(losses))
    return {
        "losses": losses,
        "merge": least,
        "gain over the best": min(losses) - least,
        "to the bottom": (mean - least) / (mean - np.min(found["grid"])),
        **found,
    }


def _by_name(found: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [each[name] for each in found] for name in found[0]}


def verdicts(figures: dict[str, Any]) -> list[Verdict]:
    return [_condition(figures), _cancelling(figures), _formula(figures), _around_the_bottom(figures)]


def _condition(figures: dict[str, Any]) -> Verdict:
    cells = {model: _stable(figures, model, "correlation") for model in MODELS}
    pairs = [share for model in MODELS for share in _all(figures, model, "positive pairs")]
    holds = [value < 1 for model in MODELS for cell in cells[model] for value in cell]
    return Verdict(
        "A merge is better than the mean of its snapshots, because the cross terms stay below the bound.",
        "[PMA] eq. 15",
        "left side < right side",
        "left side / right side, the mean over three windows: "
        + _both(lambda model: interval(_mean(cells[model])).shown(2))
        + f"; {100 * np.mean(pairs):.1f} % of all pairs of snapshots have positive curvature between them. "
        "At the end of a decay the merge is better than the mean by "
        + _both(lambda model: interval(figures["windows"][model]["decay"]["mean gain"]).shown(4))
        + " nats, than the newest by "
        + _both(lambda model: interval(figures["windows"][model]["decay"]["newest gain"]).shown(4)),
        says(holds),
        "" if all(holds) else "Some of the windows have a left side above the bound.",
    )


def _cancelling(figures: dict[str, Any]) -> Verdict:
    found = {model: interval(_mean(_stable(figures, model, "correlation"))) for model in MODELS}
    share = {model: interval(_mean(_stable(figures, model, "share of the rise"))) for model in MODELS}
    holds = [each.is_negative for each in found.values()]
    return Verdict(
        "It works because the deviations from the optimum cancel: their correlation under H is negative.",
        "[PMA] at eq. 15",
        "negative",
        "mean cross term / mean diagonal term: "
        + _both(lambda model: found[model].shown(2))
        + "; the merge takes away "
        + _both(lambda model: f"{100 * share[model].mean:.0f} ± {100 * share[model].half:.0f} %")
        + " of the snapshots' rise above the annealed weights",
        says(holds),
        "" if all(holds) else WHY_POSITIVE,
    )


WHY_POSITIVE = """\
The deviations δ_i are taken from the end of the decay that begins at the window's newest snapshot. All of
them contain the way that the decay still goes down, so their cross terms are positive. They are well below
the diagonal terms, and eq. 15 needs no more: its two sides' ratio is a correlation that has to be below 1,
not below 0. Around the merge itself the cross terms are negative, but so they are for any vectors, because
deviations from their own mean sum to 0.
"""


def _formula(figures: dict[str, Any]) -> Verdict:
    here = {model: interval(_ratio(figures, model, "mean gain by the formula")) for model in MODELS}
    below = {
        model: interval(_ratio(figures, model, "mean gain by the formula at the optimum")) for model in MODELS
    }
    newest = {
        model: interval(_ratio(figures, model, "newest gain by the formula", "newest gain"))
        for model in MODELS
    }
    holds = [abs(each.mean - 1) < CLOSE for found in (here, below) for each in found.values()]
    return Verdict(
        "The second-order formula gives the gain.",
        "[PMA] eq. 15",
        "no figure",
        "the formula over the measured gain, with H at the merge: "
        + _both(lambda model: here[model].shown(2, sign=False))
        + " (over the newest snapshot: "
        + _both(lambda model: newest[model].shown(2, sign=False))
        + "); with H at the annealed weights: "
        + _both(lambda model: below[model].shown(2, sign=False)),
        says(holds),
        "" if all(holds) else WHY_PART,
    )


CLOSE = 0.25
"""A ratio that is less than this away from 1 counts as agreement."""

WHY_PART = """\
With the Hessian at the merge the formula is right up to terms of higher order, by which the loss rises a
little faster. With the Hessian at the annealed weights, where the paper has it, it promises too much. The
differences between the snapshots are the same, so the curvature along them is larger there by the ratio of
the two figures: a falling learning rate leads into a narrower part of the valley. The condition holds at
both points, the size of the gain is only about right near the merge.
"""


def _around_the_bottom(figures: dict[str, Any]) -> Verdict:
    gains = {model: figures["planes"][model]["gain over the best"] for model in MODELS}
    lowest = [share >= 1 for model in MODELS for share in figures["planes"][model]["to the bottom"]]
    holds = [value > 0 for model in MODELS for value in gains[model]]
    return Verdict(
        "Snapshots lie around the bottom of a basin, and their merge lies near it.",
        "[PMA] Fig. 8",
        "a picture",
        "the merge of three is better than the best of them by "
        + _both(lambda model: interval(gains[model]).shown())
        + f" nats; in {sum(lowest)} of {len(lowest)} planes none of {GRID**2} points is lower than the merge",
        says(holds),
        "" if all(holds) else "In some planes one of the three snapshots is better than the merge.",
    )


def _both(shown: Any) -> str:
    return ", ".join(f"{shown(model)} ({model})" for model in MODELS)


def _stable(figures: dict[str, Any], model: str, name: str) -> list[list[float]]:
    """One list of seeds per window of the trunk."""
    return [figures["windows"][model][when][name] for when in WINDOWS if when != "decay"]


def _all(figures: dict[str, Any], model: str, name: str) -> list[float]:
    return [value for when in WINDOWS for value in figures["windows"][model][when][name]]


def _mean(cells: Sequence[Sequence[float]]) -> list[float]:
    """Over windows; one number per seed."""
    return [float(np.mean(values)) for values in zip(*cells, strict=True)]


def _ratio(figures: dict[str, Any], model: str, name: str, measured: str = "mean gain") -> list[float]:
    """The formula's gain over the measured one, summed over the windows of the trunk; one number per seed."""
    found, truth = (_mean(_stable(figures, model, each)) for each in (name, measured))
    return [a / b for a, b in zip(found, truth, strict=True)]


def draw(figures: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 9.5), layout="constrained")
    (left, right), (gains, sides) = figure.subplots(2, 2)
    for axes, model in ((left, "dense"), (right, "moe")):
        plane(axes, {name: found[0] for name, found in figures["planes"][model].items()})
        axes.set(title=f"Plane of three snapshots, {model}")
    _draw_gains(gains, figures)
    _draw_sides(sides, figures)
    return figure


def _draw_gains(axes: Axes, figures: dict[str, Any]) -> None:
    for model, marker in zip(MODELS, "os", strict=True):
        for name, colour in (("mean gain", "tab:blue"), ("newest gain", "tab:orange")):
            measured, formula = _all(figures, model, name), _all(figures, model, f"{name} by the formula")
            label = f"over the {name.split()[0]}, {model}"
            axes.plot(measured, formula, marker, color=colour, fillstyle="none", label=label)
    axes.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    axes.set(
        title="Gains, H at the merge (a point per window, seed)",
        xlabel="measured gain (nats per byte)",
        ylabel="gain by the formula (nats per byte)",
    )
    axes.legend()


def _draw_sides(axes: Axes, figures: dict[str, Any]) -> None:
    groups = {model: _stable(figures, model, "correlation") for model in MODELS}
    bars(axes, [str(length) for length in LENGTHS], groups)
    axes.axhline(1, color="tab:red", label="bound of eq. 15")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(
        title="Both sides of eq. 15, H at the annealed weights",
        xlabel="newest snapshot of the window (step of the trunk)",
        ylabel="left side / right side",
        ylim=(min(-0.1, axes.get_ylim()[0]), 1.35),
    )
    axes.legend(loc="upper right", ncols=3)
