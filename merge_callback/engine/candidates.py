"""Several merges of one window, validated side by side, and the choice among them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol, SupportsFloat

from merge_callback.engine.comparison import Comparison, Entry
from merge_callback.engine.history import History
from merge_callback.engine.validations import gains
from merge_callback.merging import MergeMethod
from merge_callback.merging.running import RunningAverage
from merge_callback.messages import info
from merge_callback.metrics import GAIN
from merge_callback.sharding import Ranks
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.merge import Merge

log = logging.getLogger(__name__)

Scores = Mapping[str, SupportsFloat]
"""What a validation has found, by metric."""

Evaluate = Callable[[Merge | None, int | None], Scores | None]
"""Validates a merge, or the live weights for ``None``, on so many batches of each dataloader or on all.

All ranks call it; the result is ``None`` on all of them if it failed on one, which is logged.
"""

Lower = Callable[[Scores], Mapping[str, bool | None]]
"""Whether lower is better, by metric; ``None`` if that is not known."""


class Source(Protocol):
    """Makes merges that are validated and published like those of the window, such as a running average.

    All ranks call both, and get the same names.
    """

    @property
    def names(self) -> Sequence[str]:
        """Of the merges that there are now."""

    def candidate(self, model: ModelTensors, name: str) -> Merge | None:
        """The one called ``name``, whose ``name`` it has; it stays as it is until another is asked for."""


class Tried(NamedTuple):
    """A merge that was validated: its method, its number of snapshots, and what it scores."""

    method: MergeMethod | RunningAverage
    snapshots: int
    scores: dict[str, float]

    @classmethod
    def of(cls, merge: Merge, scores: Scores) -> Tried:
        """A merge, and what it scores."""
        return cls(merge.method, len(merge.snapshots), _floats(scores))


class Candidates:
    """What is validated besides the merge by the default method, and which of all is the best.

    Args:
        sources: make them; further ones may be added.
        batches: of each dataloader, on which all are compared; ``None`` for all.
        ranks: the window's.
        history: what earlier validations have found; it knows the metric that chooses.
    """

    def __init__(
        self, sources: Sequence[Source], batches: int | None, ranks: Ranks, history: History
    ) -> None:
        self.sources = list(sources)
        self._batches, self._ranks, self._history = batches, ranks, history
        self._has_told = False

    @property
    def names(self) -> list[str]:
        """Of all, without the default method's."""
        return [name for source in self.sources for name in source.names]

    def merge(self, model: ModelTensors, name: str) -> Merge | None:
        """One of them; ``None`` on all ranks if there is none, or if one can't make it, which is logged."""
        try:
            for source in self.sources:
                if name in source.names:
                    return self._ranks.agreed(partial(source.candidate, model, name))
        except Exception:
            log.exception("merge: the candidate %s could not be made; training goes on", name)
        return None

    def each(self, model: ModelTensors, default: Merge) -> Iterator[Merge]:
        """All merges, the default method's first; each may end with the next."""
        yield default
        for name in self.names:
            if merge := self.merge(model, name):
                yield merge

    def compare(
        self, model: ModelTensors, default: Merge, evaluate: Evaluate, live: Scores, lower: Lower, phase: str
    ) -> Comparison | None:
        """Validates all merges, and chooses the best; ``None`` if no validation succeeded.

        With ``batches`` the live weights are validated on them, too, for the gains. Then the best merge there
        and the default method's are validated on all data, and the better of the two is taken.

        Args:
            model: the live model's tensors.
            default: the merge by the default method.
            evaluate: validates one.
            live: what the live weights score on all data.
            lower: tells the metrics' directions.
            phase: of the learning rate.
        """
        tried: dict[str, Tried] = {}
        for merge in self.each(model, default):
            if (scores := evaluate(merge, self._batches)) is not None:
                tried[merge.name] = Tried.of(merge, scores)
        if not tried:
            return None
        here = live if self._batches is None else evaluate(None, self._batches) or {}
        directions = lower(next(iter(tried.values())).scores)
        found = self.judge(default.step, tried, here, live, directions, phase)
        if self._batches is None:
            return found
        full: dict[str, dict[str, float]] = {}
        for name in dict.fromkeys([default.name, found.selected]):
            chosen = default if name == default.name else self.merge(model, name)
            if chosen and (scores := evaluate(chosen, None)) is not None:
                full[name] = _floats(scores)
        if not full:
            return None
        selected = self._best(full, found.metric, found.lower)
        return replace(found, selected=selected, metrics=full[selected], batches=self._batches)

    def judge(
        self,
        step: int,
        tried: Mapping[str, Tried],
        here: Scores,
        live: Scores,
        lower: Mapping[str, bool | None],
        phase: str,
    ) -> Comparison:
        """Chooses among merges that were validated on the same data.

        Args:
            step: of the newest snapshot.
            tried: the merges by name, the default method's first.
            here: what the live weights score on these data; the gains are over them.
            live: what they score on all data.
            lower: whether lower is better, by metric; ``None`` if that is not known.
            phase: of the learning rate.
        """
        metric = self._history.chosen({name for name, is_lower in lower.items() if is_lower is not None})
        if metric is None and not self._has_told:
            self._has_told = True
            info(
                f"merge: no candidate is chosen: {_why_not(self._history.select, lower)}; the merge by the "
                "default method is published"
            )
        direction = lower[metric] if metric else None
        selected = self._best({name: one.scores for name, one in tried.items()}, metric, direction)
        entries = []
        for name, one in tried.items():
            better = gains(here, one.scores, lower)
            known = {n.removeprefix(GAIN): gain for n, gain in better.items()}
            entries.append(Entry(name, one.method, one.snapshots, one.scores, known))
        spread = self._history.spread(metric, phase, live) if metric else None
        return Comparison(selected, step, tried[selected].scores, entries, metric, direction, spread, None)

    def _best(self, found: Mapping[str, Mapping[str, float]], metric: str | None, lower: bool | None) -> str:
        """The best one's name; without a metric, or of equal ones, the first."""
        sign = 1 if lower else -1
        values = {name: sign * scores.get(metric or "", math.nan) for name, scores in found.items()}
        values = self._ranks.from_first(values)  # they may differ by rank
        return min(values, key=lambda name: math.inf if math.isnan(values[name]) else values[name])


def _why_not(select: str | None, lower: Mapping[str, bool | None]) -> str:
    if not lower:
        return "the validation has found no metric"
    names = ", ".join(sorted(lower))
    if select is not None and select not in lower:
        return f"select={select!r} names no metric of the validation, whose metrics are {names}"
    return (
        f"whether lower is better is not known of {select or names}; say so with lower_is_better=, or with "
        "higher_is_better="
    )


def _floats(scores: Scores) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items()}
