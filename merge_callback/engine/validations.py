"""What the validations of a run have found: how much each merge gains, and which gained most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, SupportsFloat

from merge_callback.engine.comparison import Comparison
from merge_callback.engine.forecast import forecast
from merge_callback.engine.plan import from_here
from merge_callback.metrics import FORECAST, FORECAST_ERROR, GAIN
from merge_callback.publish.emission import Publisher
from merge_callback.snapshots.snapshot import Snapshot

_REMEMBERED = 16

Segment = tuple[str, int]
"""A phase of the learning rate, and the step that it began at: what a merge never crosses."""


def gains(
    live: Mapping[str, SupportsFloat], merged: Mapping[str, SupportsFloat], lower: Mapping[str, bool | None]
) -> dict[str, float]:
    """How much better the merged weights score, by metric: positive is better whichever way it improves.

    Args:
        live: what the live weights score.
        merged: what the merged weights score.
        lower: whether lower is better, by metric; a metric with ``None`` has no gain.
    """
    return {
        f"{GAIN}{name}": (float(live[name]) - float(merged[name])) * (1 if lower[name] else -1)
        for name in merged
        if name in live and lower.get(name) is not None
    }


@dataclass(frozen=True)
class Scored:
    """What a merge scored in a validation.

    Args:
        metrics: by the names that the live ones have.
        shown: the same by the names that loggers have.
        lower: whether lower is better, by the live name; ``None`` if that is not known.
        step: of the merge's newest snapshot.
        newest: that snapshot; ``None`` if the merge is not one of the window's.
        numbers: what else is logged.
        seconds: that the validation took; ``None`` if that is not known.
        compared: what the candidates score, if there are any; the merge is the best one then.
    """

    metrics: Mapping[str, SupportsFloat]
    shown: Mapping[str, float]
    lower: Mapping[str, bool | None]
    step: int
    newest: Snapshot | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    compared: Comparison | None = None


@dataclass(frozen=True)
class Validation:
    """The validation of a merge, whose newest snapshot is of ``step``; ``gains`` by metric."""

    step: int
    phase: str
    since: int
    gains: dict[str, float]

    @property
    def segment(self) -> Segment:
        """That of the merge."""
        return self.phase, self.since


class Validations:
    """The last validations of a run, and for each metric the one whose merge gained most."""

    def __init__(self) -> None:
        self.recent: list[Validation] = []
        self.best: dict[str, Validation] = {}
        self.added: dict[str, float] = {}  # by a decay to the last merge before it, by metric
        self._before: dict[str, float] = {}  # what that merge scored
        self._decayed: dict[str, float] = {}  # what the live weights score in a decay

    def note(
        self,
        newest: Snapshot,
        live: Mapping[str, SupportsFloat],
        merged: Mapping[str, SupportsFloat],
        lower: Mapping[str, bool | None],
    ) -> dict[str, float]:
        """Notes a validation; returns what is logged of it besides the merged metrics themselves.

        Args:
            newest: the newest snapshot of the merge.
            live: what the live weights score.
            merged: what the merged weights score.
            lower: whether lower is better, by metric; ``None`` if that is not known.
        """
        found = gains(live, merged, lower)
        known = {n.removeprefix(GAIN): gain for n, gain in found.items() if math.isfinite(gain)}
        validation = Validation(newest.step, newest.phase, newest.since, known)
        if self.recent and self.recent[-1].step == newest.step:  # on further data
            before = self.recent.pop()
            validation = replace(validation, gains={**before.gains, **known})
        self.recent = [*self.recent[1 - _REMEMBERED :], validation]
        for name, gain in known.items():
            if name not in self.best or gain > self.best[name].gains[name]:
                self.best[name] = validation
        self._note_decay(newest.phase, {n: (float(live[n]), float(merged[n])) for n in known})
        return found

    def _note_decay(self, phase: str, scores: Mapping[str, tuple[float, float]]) -> None:
        """Notes what a decay adds to the last merge before it: the next one may add as much."""
        if phase == "decay":
            self._decayed |= {name: live for name, (live, _) in scores.items() if name in self._before}
        elif phase == "stable":
            self.added |= {name: live - self._before[name] for name, live in self._decayed.items()}
            self._decayed = {}
            self._before |= {name: merged for name, (_, merged) in scores.items()}

    def forecasts(
        self, merged: Mapping[str, SupportsFloat], lower: Mapping[str, bool | None]
    ) -> dict[str, float]:
        """What is logged of the forecasts, as far as there are any; right after ``note``.

        Args:
            merged: what the merged weights score.
            lower: whether lower is better, by metric.
        """
        found: dict[str, float] = {}
        segment = self.recent[-1].segment
        for name in self.recent[-1].gains.keys() & merged.keys():
            gains = [v.gains[name] for v in self.recent if v.segment == segment and name in v.gains]
            known = forecast(float(merged[name]), gains, bool(lower[name]), self.added.get(name))
            if known:
                found[f"{FORECAST}{name}"], found[f"{FORECAST_ERROR}{name}"] = known
        return found

    def last_gains(self, segment: Segment) -> list[float]:
        """The gains of the last merges of a segment, in the metric that is spoken of; oldest first."""
        known = [v.gains.get(self.metric) for v in self.recent if v.segment == segment]
        return [gain for gain in known if gain is not None]

    @property
    def metric(self) -> str:
        """The metric that is spoken of: a loss if there is one; empty before the first validation."""
        return min(self.best, key=lambda name: ("loss" not in name, name), default="")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as primitives."""
        return {
            "recent": [asdict(validation) for validation in self.recent],
            "best": {name: asdict(validation) for name, validation in self.best.items()},
            "decays": [dict(scores) for scores in (self.added, self._before, self._decayed)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self.recent = [Validation(**validation) for validation in state["recent"]]
        self.best = {name: Validation(**validation) for name, validation in state["best"].items()}
        self.added, self._before, self._decayed = state.get("decays", ({}, {}, {}))


def closing_line(
    validations: Validations, count: int, publisher: Publisher, best: int | None, spread: float | None
) -> str:
    """What the user reads at the end of a run.

    Args:
        validations: the run's.
        count: number of merges that were published.
        publisher: which has published at least one.
        best: step of the published merge that scored best; ``None`` if none of them was validated.
        spread: the standard deviation of the live metric's noise; ``None`` if that is not known.
    """
    newest, metric = _place(publisher, publisher.newest_step), validations.metric
    line = f"merge: {count} merge{'s' * (count != 1)} published, "
    line += f"the newest is {newest}" if newest else "of which none is there any more"
    if metric and best is not None:
        place = _place(publisher, best)
        line += f", the best in {metric} {'too' if place == newest else f'is {place}'}"
    if not metric:
        return line
    most = validations.best[metric]
    if most.gains[metric] <= 0:
        return f"{line}; no merge scored better than the live weights"
    gain = f"{most.gains[metric]:.3g} in {metric}"
    noise = "" if spread is None else f"; the live {metric} scatters by {spread:.2g} between validations"
    return f"{line}; the largest gain was {gain}, at step {most.step:,} ({most.phase} phase){noise}"


def _place(publisher: Publisher, step: int) -> Path | str | None:
    """Where the newest merge up to a step is, as one would type it."""
    place = publisher.newest_up_to(step)
    return from_here(place) if isinstance(place, Path) else place
