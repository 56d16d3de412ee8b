"""What a validation of several merges has found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from merge_callback.merging import MergeMethod
from merge_callback.merging.running import RunningAverage
from merge_callback.metrics import GAIN


@dataclass(frozen=True)
class Entry:
    """What one candidate scored, on the batches that all were compared on."""

    name: str
    method: MergeMethod | RunningAverage
    snapshots: int
    metrics: dict[str, float]
    gains: dict[str, float]

    def record(self) -> dict[str, Any]:
        """Everything as primitives; what is not finite is left out."""
        return {
            "name": self.name,
            "method": self.method.name,
            "options": self.method.options(),
            "last": self.method.newest,
            "order": self.method.arrangement,
            "snapshots": self.snapshots,
            "metrics": _finite(self.metrics),
            "gains": _finite(self.gains),
        }


@dataclass(frozen=True)
class Comparison:
    """What the validation of several merges has found.

    Args:
        selected: the name of the one that is published.
        step: of the newest snapshot.
        metrics: what that one scores on all of the validation data.
        entries: all of them, the default method's first.
        metric: that chose; ``None`` if the direction of none is known.
        lower: whether lower is better there.
        spread: the standard deviation of the live metric's noise from one validation to the next; ``None`` if
            there were fewer than five in this phase.
        batches: on which they were compared; ``None`` for all.
    """

    selected: str
    step: int
    metrics: dict[str, float]
    entries: list[Entry]
    metric: str | None
    lower: bool | None
    spread: float | None
    batches: int | None

    def logged(self, named: Callable[[str, str], str]) -> tuple[dict[str, float], dict[str, float]]:
        """The metrics and the gains of all, by the names that loggers see.

        Args:
            named: gives the name of a candidate's metric.
        """
        metrics = {named(e.name, name): value for e in self.entries for name, value in e.metrics.items()}
        found = {f"{GAIN}{e.name}/{name}": gain for e in self.entries for name, gain in e.gains.items()}
        return metrics, found

    def record(self) -> dict[str, Any]:
        """What ``merge.json`` says of it, as primitives."""
        return {
            "selected": self.selected,
            "select": self.metric,
            "lower_is_better": self.lower,
            "spread": self.spread,
            "batches": self.batches,
            "scores": [entry.record() for entry in self.entries],
        }


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}
