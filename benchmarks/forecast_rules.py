"""Rules that forecast what annealing gives, judged on the records of ``benchmarks/forecast.py``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUARTER = 0.25
"""The length of the decay that is forecast, as a share of the steps before it."""

LEVEL = 0.7
"""The least of the last five gains over the largest, from which on they count as level."""


@dataclass(frozen=True)
class Case:
    """A fork: what was known where it began, and what it reached. Gains are positive if merges are better."""

    trunk: int
    name: str
    step: int
    share: float
    shape: str
    live: float
    merged: float
    gains: tuple[float, ...]
    others: Mapping[str, float]
    annealed: float
    sign: int

    @property
    def gain(self) -> float:
        """The mean of the last five."""
        return statistics.mean(self.gains)

    @property
    def is_level(self) -> bool:
        """Whether the gains no longer rise."""
        return min(self.gains) >= LEVEL * max(self.gains) > 0

    @property
    def rest(self) -> float:
        """How much better the annealed model is than the merge."""
        return (self.merged - self.annealed) * self.sign


def cases(trunks: Sequence[Mapping[str, Any]], metric: str) -> list[Case]:
    """All forks, by one metric: ``"loss"`` or ``"accuracy"``."""
    sign = 1 if metric == "loss" else -1
    return [
        Case(
            trunk=i,
            name=trunk["name"],
            step=point["step"],
            share=fork["decay"] / point["step"],
            shape=fork["shape"],
            live=point["live"][-1][metric],
            merged=point["merged"][-1][metric],
            gains=tuple(
                (live[metric] - merged[metric]) * sign
                for live, merged in zip(point["live"], point["merged"], strict=True)
            ),
            others={name: scores[metric] for name, scores in point["others"].items()},
            annealed=fork["annealed"][metric],
            sign=sign,
        )
        for i, trunk in enumerate(trunks)
        for point in trunk["points"]
        for fork in point["forks"]
    ]


Rule = Callable[[Case, Sequence[Case]], float]
"""The forecast of a case, with others to fit on."""


def _less_share_of_gain(case: Case, known: Sequence[Case]) -> float:
    share = statistics.mean(other.rest / other.gain for other in known)
    return case.merged - case.sign * share * case.gain


def _less_constant(case: Case, known: Sequence[Case]) -> float:
    return case.merged - case.sign * statistics.mean(other.rest for other in known)


def _live_less_share(case: Case, known: Sequence[Case]) -> float:
    share = statistics.mean((other.rest + other.gains[-1]) / other.gains[-1] for other in known)
    return case.live - case.sign * share * case.gains[-1]


def _less_share_of_merged(case: Case, known: Sequence[Case]) -> float:
    share = statistics.mean(other.rest / other.merged for other in known)
    return case.merged * (1 - case.sign * share)


FITTED: Mapping[str, Rule] = {
    "merge - share x mean gain": _less_share_of_gain,
    "live - share x last gain": _live_less_share,
    "merge - constant": _less_constant,
    "merge - share of itself": _less_share_of_merged,
}


def errors(judged: Sequence[Case], forecast: Callable[[Case], float]) -> dict[str, float]:
    """How far forecasts are off: positive if annealing gives a better model than was forecast."""
    off = [(forecast(case) - case.annealed) * case.sign for case in judged]
    return {
        "cases": len(off),
        "mean": statistics.mean(off),
        "spread": statistics.stdev(off),
        "mean absolute": statistics.mean(map(abs, off)),
        "largest": max(map(abs, off)),
    }


def left_out(all_cases: Sequence[Case], case: Case, same: Callable[[Case, Case], bool]) -> list[Case]:
    """The level cases of the same length of decay that a rule for ``case`` may be fitted on."""
    return [
        other
        for other in all_cases
        if other.is_level and (other.share, other.shape) == (case.share, case.shape) and not same(case, other)
    ]


def table(all_cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Errors by rule, over the level cases that annealed for a quarter of the steps before."""
    judged = [c for c in all_cases if c.is_level and c.share == QUARTER and c.shape == "1-sqrt"]
    found = {"the merge as it is": errors(judged, lambda case: case.merged)}
    for name in judged[0].others:
        found[name] = errors(judged, lambda case, name=name: case.others[name])  # type: ignore[misc]
    by_run = [left_out(all_cases, case, lambda a, b: a.trunk == b.trunk) for case in judged]
    by_kind = [left_out(all_cases, case, lambda a, b: _kind(a) == _kind(b)) for case in judged]
    for name, rule in FITTED.items():
        for how, known in (("this run left out", by_run), ("this kind of model left out", by_kind)):
            if all(known):
                fitted = dict(zip(map(id, judged), known, strict=True))
                found[f"{name}, {how}"] = errors(
                    judged,
                    lambda case, rule=rule, fitted=fitted: rule(case, fitted[id(case)]),  # type: ignore[misc]
                )
    later = [c for c in judged if _own(judged, c)]
    for name, rule in FITTED.items() if len(later) > 1 else ():
        found[f"{name}, by the run's own earlier fork"] = errors(
            later,
            lambda case, rule=rule: rule(case, _own(judged, case)),  # type: ignore[misc]
        )
        found[f"{name}, this run left out, in the same cases"] = errors(
            later,
            lambda case, rule=rule: rule(case, left_out(all_cases, case, lambda a, b: a.trunk == b.trunk)),  # type: ignore[misc]
        )
    return found


def shares(all_cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """The rest over the mean gain, by length of the decay, over level cases."""
    lengths = sorted({(case.share, case.shape) for case in all_cases if case.is_level})
    return {
        f"{share:.0%}, {shape}": {
            "cases": len(found),
            "mean": statistics.mean(found),
            "spread": statistics.stdev(found) if len(found) > 1 else 0.0,
        }
        for share, shape in lengths
        if (found := [*_shares(all_cases, share, shape)])
    }


def _shares(all_cases: Sequence[Case], share: float, shape: str) -> Iterator[float]:
    for case in all_cases:
        if case.is_level and (case.share, case.shape) == (share, shape):
            yield case.rest / case.gain


def _own(judged: Sequence[Case], case: Case) -> list[Case]:
    return [other for other in judged if other.trunk == case.trunk and other.step < case.step]


def _kind(case: Case) -> str:
    return case.name.partition(",")[0]


def draw(all_cases: Sequence[Case], path: Path) -> None:
    """Draws the merge, and the fitted forecast, against what annealing gave."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    judged = [c for c in all_cases if c.is_level and c.share == QUARTER and c.shape == "1-sqrt"]
    figure, axes = pyplot.subplots(figsize=(6, 5))
    annealed = [case.annealed for case in judged]
    axes.scatter(annealed, [c.live for c in judged], color="tab:blue", label="live, before")
    axes.scatter(annealed, [c.merged for c in judged], color="tab:orange", label="merge, before")
    fitted = [_less_share_of_gain(c, left_out(all_cases, c, lambda a, b: a.trunk == b.trunk)) for c in judged]
    axes.scatter(annealed, fitted, color="tab:green", marker="x", label="forecast, its run left out")
    ends = [min(annealed), max(annealed)]
    axes.plot(ends, ends, color="gray", linewidth=1, label="what annealing gave")
    axes.set_xlabel("validation loss after the decay, nats per byte")
    axes.set_ylabel("before it, and forecast")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
