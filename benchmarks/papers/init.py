"""The next stage begun with the last checkpoint or with a merge."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.curves import points
from benchmarks.papers.paired import difference, extent
from benchmarks.papers.runs import Curve
from benchmarks.papers.spec import Spec
from benchmarks.papers.stages import STAGES, Stage, before, run
from benchmarks.papers.study import Study
from benchmarks.papers.verdict import Interval, Verdict, says

TITLE = "The next stage, from the last checkpoint or from a merge"

CONCLUSION = """\
Begin a next stage with the merge if the run before it has not decayed: the start is calmer, and what
remains at the end is parity or a small gain, larger the lower the new learning rate. After a decay the
last checkpoint is as good, or better by a hair. For the decay itself, going on from the last checkpoint is
as good at the same rate."""

Figures = dict[str, Any]


def runs(study: Study, seed: int) -> list[Spec]:
    return [
        run(study, name, seed, rate, count)
        for name, stage in STAGES.items()
        for rate in stage.rates
        for count in (1, *stage.counts)
    ]


SPANS = {"first tenth": (0.0, 0.1), "second tenth": (0.1, 0.2), "last half": (0.5, 1.0)}
"""Parts of a stage whose training loss and gradient norm are averaged."""
SHOWN, BLOCK = ("continued", 4e-3), 5
"""The stage and learning rate that are drawn, as means of some steps."""
PARITY = 0.005
"""A difference of losses that counts as none, nats per byte."""


def measure(study: Study) -> Figures:
    """Per stage, peak learning rate and number of snapshots that it begins with."""
    return {
        "stages": {
            name: {
                rate: {count: _figures(study, name, rate, count) for count in (1, *stage.counts)}
                for rate in stage.rates
            }
            for name, stage in STAGES.items()
        },
        "curves": {count: _curves(study, count) for count in (1, *STAGES[SHOWN[0]].counts)},
    }


def _figures(study: Study, name: str, rate: float, count: int) -> Figures:
    specs = [run(study, name, seed, rate, count) for seed in study.seeds]
    begins = [
        spec.weights or before(study, name, seed)[0].at(spec.begin) for spec, seed in _zip(specs, study)
    ]
    found = [study.run(spec) for spec in specs]
    return {
        "before": [study.score(begin, mix=spec.mix).loss for begin, spec in zip(begins, specs, strict=True)],
        "after": [study.score(spec.at(spec.end)).loss for spec in specs],
        "loss": {span: [_mean(each.losses, *ends) for each in found] for span, ends in SPANS.items()},
        "norm": {span: [_mean(each.gradient_norms, *ends) for each in found] for span, ends in SPANS.items()},
        "spikes": [spikes(each.gradient_norms) for each in found],
        "roughness": [roughness(each.gradient_norms) for each in found],
    }


def _zip(specs: list[Spec], study: Study) -> Iterator[tuple[Spec, int]]:
    return zip(specs, study.seeds, strict=True)


def _mean(curve: Curve, begin: float, end: float) -> float:
    return float(curve[round(begin * len(curve)) : max(1, round(end * len(curve)))].mean())


def spikes(norms: Curve) -> int:
    """Steps whose gradient norm is half as large again as the median of the eleven around it."""
    around = [statistics.median(norms[max(0, i - 5) : i + 6].tolist()) for i in range(len(norms))]
    return int((norms > 1.5 * np.array(around)).sum())


def roughness(norms: Curve) -> float:
    """By what share the gradient norm changes from step to step, on average over the first fifth."""
    return float(np.abs(np.diff(np.log(norms[: max(2, len(norms) // 5)]))).mean())


def _curves(study: Study, count: int) -> Figures:
    """Training loss and gradient norm of the stage that is drawn, means of blocks of steps, per block."""
    name, rate = SHOWN
    found = [study.run(run(study, name, seed, rate, count)) for seed in study.seeds]
    return {
        "loss": [_blocks(each.losses) for each in found],
        "norm": [_blocks(each.gradient_norms) for each in found],
    }


def _blocks(curve: Curve) -> list[float]:
    whole = len(curve) // BLOCK * BLOCK
    blocks: list[float] = curve[:whole].reshape(-1, BLOCK).mean(1).tolist()
    return blocks


def verdicts(figures: Figures) -> list[Verdict]:
    return [_decay(figures), _calmer(figures), _norms(figures), _later(figures)]


def against_last(
    figures: Figures, names: Mapping[str, Stage] | list[str], *path: str, count: int = 10
) -> list[Interval]:
    """A figure from the merge less that from the last checkpoint, of each stage and learning rate."""
    found = []
    for name in names:
        for rate in figures["stages"][name].values():
            merged, last = rate[f"{count}"], rate["1"]
            for key in path:
                merged, last = merged[key], last[key]
            found.append(difference(merged, last))
    return found


NEW = [name for name in STAGES if name != "decay"]


def _decay(figures: Figures) -> Verdict:
    found = against_last(figures, ["decay"], "after")
    holds = [not each.is_negative for each in found]
    return Verdict(
        "A decay that begins with a merge ends no better.",
        "[PG] Tab. 1",
        "slightly worse",
        f"{', '.join(each.shown(4) for each in found)} nats at peak rates of "
        f"{', '.join(figures['stages']['decay'])}",
        says(holds),
        "" if all(holds) else WHY_DECAY,
    )


def _calmer(figures: Figures) -> Verdict:
    begins, first = against_last(figures, NEW, "before"), against_last(figures, NEW, "loss", "first tenth")
    holds = [each.is_negative for each in (*begins, *first)]
    return Verdict(
        "A next stage that begins with a merge has a lower loss at first.",
        "[PMA] §4.4, Fig. 6",
        "slightly lower at first",
        f"held-out loss before it {extent(begins)} nats, training loss in its first tenth {extent(first)} "
        f"({len(first)} cases)",
        says(holds),
        "" if all(holds) else WHY_CALMER,
    )


def _norms(figures: Figures) -> Verdict:
    first = against_last(figures, NEW, "norm", "first tenth")
    second = against_last(figures, NEW, "norm", "second tenth")
    counted, rough = against_last(figures, NEW, "spikes"), against_last(figures, NEW, "roughness")
    holds = [each.is_negative for each in (*first, *rough)]
    return Verdict(
        "Its gradient norm is lower at first, and smoother.",
        "[PMA] §4.4, Fig. 7 left",
        "smoother",
        f"the mean norm differs by {extent(first)} in the first tenth, {extent(second)} in the second; its "
        f"relative change from step to step by {extent(rough)}; spikes by {extent(counted, 1)} a stage",
        says(holds),
        "" if all(holds) else WHY_NORMS,
    )


def _later(figures: Figures) -> Verdict:
    found = {
        name: {count: against_last(figures, [name], "after", count=count) for count in STAGES[name].counts}
        for name in NEW
    }
    cells = [each for counts in found.values() for several in counts.values() for each in several]
    holds = [each.mean < PARITY for each in cells]
    shown = "; ".join(
        f"{name}, merge of {count}: {', '.join(each.shown(4) for each in several)}"
        for name, counts in found.items()
        for count, several in counts.items()
    )
    return Verdict(
        "In the end it is as good as from the last checkpoint, or better, at any learning rate.",
        "[PMA] §4.4, Tab. 1; App. B",
        "parity, no gain promised",
        f"held-out loss against the last checkpoint, by peak rate: {shown} nats",
        says(holds),
        "" if all(holds) else WHY_LATER,
    )


WHY_DECAY = (
    "At the learning rate of the phase before, which is the paper's case, the merge brings nothing: the "
    "first steps make as much noise as it had removed. At a quarter of that rate it does help: the last "
    "weights then need many small steps to lose noise that the merge never had."
)
WHY_CALMER = (
    "After a decay the snapshots are so close together that their merge is almost the last checkpoint: "
    "nothing changes, neither for better nor for worse. In every other case the loss is lower from the "
    "first step on."
)
WHY_NORMS = (
    "The norm is lower in the first tenth of the steps, by a tenth of it, most clearly without a decay "
    "before. It is no smoother from step to step: how it varies comes from the batches, which are the "
    "same ones. Later it is a little higher than from the last checkpoint. There are no spikes for the "
    "merge to prevent in stages this short."
)
WHY_LATER = "In some of the cases the stage ends worse from the merge than from the last checkpoint."

LABELS = {"1": "the last checkpoint", "3": "the merge of three", "10": "the merge of ten"}


def draw(figures: Figures) -> Figure:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    loss, norm, after = figure.subplots(1, 3)
    for axis, name, unit in ((loss, "loss", "training loss, nats per byte"), (norm, "norm", "gradient norm")):
        for count, curves in figures["curves"].items():
            blocks = list(zip(*curves[name], strict=True))
            places = [BLOCK * (k + 0.5) for k in range(len(blocks))]
            axis.plot(places, [statistics.mean(block) for block in blocks], label=f"from {LABELS[count]}")
        axis.set(title=STAGES[SHOWN[0]].title, xlabel="step of the stage", ylabel=unit)
        axis.grid(alpha=0.3)
    loss.legend(fontsize=8)
    _ends(after, figures)
    return figure


def _ends(axis: Axes, figures: Figures) -> None:
    """What the merge of ten changes at the beginning and at the end, for each stage and rate."""
    cases = [(name, rate) for name in STAGES for rate in figures["stages"][name]]
    for key, marker in (("before", "s"), ("after", "o")):
        found = against_last(figures, STAGES, key)
        points(axis, found, fmt=marker, label=key)
    axis.set_yticks(range(len(cases)), [f"{name}, {rate}" for name, rate in cases], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set(title="merge of ten - last checkpoint", xlabel="held-out loss, nats per byte")
    axis.locator_params(axis="x", nbins=5)
    axis.legend(fontsize=8, loc=(0.03, 0.29))
    axis.grid(alpha=0.3)
