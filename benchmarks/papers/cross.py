"""Merges across data mixes, decay schedules and phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.curves import points
from benchmarks.papers.paired import difference, listed
from benchmarks.papers.spec import Snapshot, Spec, merge
from benchmarks.papers.study import DECAY, Model, Study
from benchmarks.papers.verdict import Verdict, interval, says

TITLE = "Merges across data, schedules and phases"

CONCLUSION = """\
Keep a merge within one phase: the callback's windows end where the phase does. Decays of the same trunk
that read different data, or the same data in another order, make a better model together than each alone,
at the price of a decay more; decays that differ only in their schedule do not."""

Figures = dict[str, Any]

LENGTH = 1600
"""Steps before the decays part."""
FORKS: dict[str, dict[str, Any]] = {
    "both": {},
    "both, other order": {"order": 1},
    "code": {"mix": "code"},
    "prose": {"mix": "prose"},
    "linear": {"schedule": "linear"},
    "cosine": {"schedule": "cosine"},
}
"""Decays of the same trunk: on both texts by 1-sqrt, except for what is changed."""


SCHEDULES = {"1-sqrt": "both", "linear": "linear", "cosine": "cosine"}
"""The decays that differ by their schedule."""
SHARES = {"half of the decay": 0.5, "end": 1.0}
MIXED = ("both", "both, other order", "code", "prose")
"""Those that the mixture of experts takes, too."""


def runs(study: Study, seed: int) -> list[Spec]:
    return [fork(study, model, seed, name) for model, names in forks().items() for name in names]


def forks() -> dict[Model, Sequence[str]]:
    """The names of each model's decays."""
    return {"dense": tuple(FORKS), "moe": MIXED}


def fork(study: Study, model: Model, seed: int, name: str) -> Spec:
    """One of the decays."""
    return study.decay(model, seed, LENGTH, **FORKS[name])


WINDOWS: dict[str, tuple[int, ...]] = {
    "stable": tuple(range(LENGTH - 180, LENGTH + 1, 20)),
    "decay": tuple(range(LENGTH + 220, LENGTH + 401, 20)),
    "end of both": tuple(range(LENGTH - 80, LENGTH + 1, 20)) + tuple(range(LENGTH + 320, LENGTH + 401, 20)),
    "across": tuple(range(LENGTH - 80, LENGTH + 101, 20)),
}
"""Steps of the snapshots of four merges of ten: of one phase, of both phases' ends, and over the border."""


def measure(study: Study) -> Figures:
    return {
        "mixes": {model: _mixes(study, model) for model in forks()},
        "schedules": {point: _schedules(study, share) for point, share in SHARES.items()},
        "phases": {model: _phases(study, model) for model in forks()},
    }


def _mixes(study: Study, model: Model) -> Figures:
    """Losses on each text of the decays' ends and of their merges."""
    merges = {
        "code + prose": ("code", "prose"),
        "both + code + prose": ("both", "code", "prose"),
        "both + both, other order": ("both", "both, other order"),
    }
    targets = {name: [_end(study, model, seed, name) for seed in study.seeds] for name in MIXED} | {
        title: [merge([_end(study, model, seed, name) for name in names]) for seed in study.seeds]
        for title, names in merges.items()
    }
    return {
        title: {
            text: [study.score(each, mix=text).loss for each in found] for text in ("both", "code", "prose")
        }
        for title, found in targets.items()
    }


def _end(study: Study, model: Model, seed: int, name: str, share: float = 1.0) -> Snapshot:
    spec = fork(study, model, seed, name)
    return spec.at(study.steps(LENGTH * (1 + DECAY * share)))


def _schedules(study: Study, share: float) -> Figures:
    """Losses at a share of the decays: of each schedule, of merges over them, and of a merge along one."""
    live = {
        name: [_end(study, "dense", seed, fork, share) for seed in study.seeds]
        for name, fork in SCHEDULES.items()
    }
    order = [_end(study, "dense", seed, "both, other order", share) for seed in study.seeds]
    targets: dict[str, Any] = {
        **live,
        "all three": [merge(each) for each in zip(*live.values(), strict=True)],
        "1-sqrt in two orders": [merge(each) for each in zip(live["1-sqrt"], order, strict=True)],
        "along 1-sqrt": [each.spec.window(each.step, 3, study.steps(20)) for each in live["1-sqrt"]],
    }
    found = {name: [study.score(each).loss for each in several] for name, several in targets.items()}
    best = [study.best(each) for each in zip(*live.values(), strict=True)]
    return {**found, "best": [study.score(each).loss for each in best]}


def _phases(study: Study, model: Model) -> Figures:
    """Losses of the live model at the ends of both phases, and of the merges of ``WINDOWS``."""
    lines = [fork(study, model, seed, "both") for seed in study.seeds]
    ends = {"stable, live": LENGTH, "decay, live": round(LENGTH * (1 + DECAY))}
    live = {name: [study.score(line.at(study.steps(at))).loss for line in lines] for name, at in ends.items()}
    merged = {
        name: [study.score(merge([line.at(study.steps(s)) for s in steps])).loss for line in lines]
        for name, steps in WINDOWS.items()
    }
    border = WINDOWS["across"][-1]
    return {
        **live,
        "border, live": [study.score(line.at(study.steps(border))).loss for line in lines],
        **merged,
    }


def verdicts(figures: Figures) -> list[Verdict]:
    return [_over_mixes(figures), _against_mixture(figures), _over_schedules(figures), _over_phases(figures)]


def _over_mixes(figures: Figures) -> Verdict:
    """Against the better one of the parts, on the mixture of the texts."""
    gains, control = {}, {}
    for model, found in figures["mixes"].items():
        parts = [min(pair) for pair in zip(found["code"]["both"], found["prose"]["both"], strict=True)]
        gains[model] = difference(parts, found["code + prose"]["both"])
        control[model] = difference(found["both"]["both"], found["both + both, other order"]["both"])
    holds = [each.is_positive for each in gains.values()]
    return Verdict(
        "A merge of models whose decays read different data is better than each of them.",
        "[PG] Tab. 4",
        "a modest improvement",
        f"on both texts {listed(gains)} nats over the better one; of two decays on the same data in "
        f"different orders {listed(control)}",
        says(holds),
        "" if all(holds) else WHY_MIXES,
    )


def _against_mixture(figures: Figures) -> Verdict:
    gains = {
        title: [difference(f["both"]["both"], f[title]["both"]) for f in figures["mixes"].values()]
        for title in ("code + prose", "both + code + prose")
    }
    holds = [each.mean > -0.005 for several in gains.values() for each in several]
    return Verdict(
        "It replaces the decay on the mixture of the data.",
        "[PG] Tab. 4",
        "not claimed",
        f"{listed(gains)} nats against the decay on both (dense, MoE)",
        says(holds),
        "" if all(holds) else WHY_MIXTURE,
    )


def _over_schedules(figures: Figures) -> Verdict:
    names = ("all three", "1-sqrt in two orders", "along 1-sqrt")
    gains = {
        point: {name: difference(found["best"], found[name]) for name in names}
        for point, found in figures["schedules"].items()
    }
    holds = [each["all three"].is_positive for each in gains.values()]
    return Verdict(
        "A merge of decays with different schedules is better than the best of them.",
        "[PG] Tab. 5",
        "a modest improvement",
        "; ".join(f"{point}: {listed(each, 4)}" for point, each in gains.items()) + " nats",
        says(holds),
        "" if all(holds) else WHY_SCHEDULES,
    )


def _over_phases(figures: Figures) -> Verdict:
    against = {
        other: [difference(found["end of both"], found[other]) for found in figures["phases"].values()]
        for other in ("decay", "stable", "decay, live")
    }
    border = {
        other: [difference(found["across"], found[other]) for found in figures["phases"].values()]
        for other in ("stable", "border, live")
    }
    holds = [each.is_positive for other in ("decay", "stable") for each in against[other]]
    return Verdict(
        "A merge of snapshots of both phases is worse than one of either phase alone.",
        "[PG] Tab. 11",
        "worse",
        f"five of each phase's end, nats worse than (dense, MoE): {listed(against)}; ten over the border, "
        f"worse than: {listed(border)}",
        says(holds),
        "" if all(holds) else WHY_PHASES,
    )


WHY_MIXES = "On average the merge is better, but not surely over these seeds."
WHY_MIXTURE = (
    "Each of the two decays forgets some of the text that it does not read, and the mean undoes most of "
    "this, not all. With the decay on the mixture as a third part hardly anything is lost, but nothing is "
    "gained either, though three decays were paid."
)
WHY_SCHEDULES = (
    "The three decays read the same batches and end near one another, so there is little to average away, "
    "and the mean includes the worse ones; halfway the slower schedules are still at a high rate and far "
    "behind. Two decays with the same schedule that read their data in different orders do gain, at "
    "either point, by more than three snapshots of one decay: what helps is other data, not another "
    "schedule."
)
WHY_PHASES = (
    "It is worse than the merge of the decay alone and than its last weights, as in the paper. It is "
    "better than the merge of the stable phase, since half of it comes from a model with a much lower "
    "loss; the paper's phases lie closer together."
)


def draw(figures: Figures) -> Figure:
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    mixes = {name: each["both"] for name, each in figures["mixes"]["dense"].items()}
    _bars(axes[0], mixes, "dense: decays on texts, scored on both")
    _bars(axes[1], figures["schedules"]["end"], "dense: ends of decays by schedule")
    _bars(axes[2], figures["phases"]["dense"], "dense: merges of phases")
    return figure


def _bars(axis: Axes, found: dict[str, list[float]], title: str) -> None:
    points(axis, [interval(values) for values in found.values()], fmt="o")
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    axis.set(title=title, xlabel="held-out loss, nats per byte")
