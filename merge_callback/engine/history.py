"""What a run's snapshots and validations have measured so far, as rows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any, SupportsFloat

from merge_callback.noise import spread
from merge_callback.snapshots.snapshot import Snapshot

_NEAR = 16  # validations whose noise is measured

_MOST = 10_000  # rows that are kept: in a checkpoint they take a few megabytes


class History:
    """The newest 10,000 rows of a run: one for each snapshot and for each validation, in their order.

    Args:
        select: the metric that merges are compared by; ``None`` for the first by its name whose direction is
            known, a loss before others.
    """

    def __init__(self, select: str | None = None) -> None:
        self.select = select
        self.rows: deque[dict[str, Any]] = deque(maxlen=_MOST)
        self.lower: dict[str, bool] = {}  # whether lower is better, by the name of a live metric

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> History:
        """That of a ``state_dict``."""
        history = cls()
        history.load_state_dict(state)
        return history

    def add_snapshot(self, snapshot: Snapshot, logged: Mapping[str, float]) -> None:
        """Notes a snapshot, and what was logged of it."""
        own = {"event": "snapshot", "step": snapshot.step, "tokens": snapshot.tokens, "phase": snapshot.phase}
        self._add({**own, "lr": snapshot.lr}, logged)

    def add_validation(
        self,
        at: Mapping[str, Any],
        live: Mapping[str, SupportsFloat],
        logged: Mapping[str, float],
        merge_step: int | None,
        lower: Mapping[str, bool | None],
    ) -> None:
        """Notes a validation.

        Args:
            at: its step, tokens and phase.
            live: what the live weights scored.
            logged: what was logged of the merge that was validated, by the names that loggers see.
            merge_step: the step of that merge's newest snapshot; ``None`` if no merge was validated.
            lower: whether lower is better, by the name of a live metric; ``None`` if that is not known.
        """
        known = {name: is_lower for name, is_lower in lower.items() if is_lower is not None}
        self.lower = self.lower | known  # a new mapping: the background may be reading the old one
        scores = {name: float(value) for name, value in live.items()}
        self._add({"event": "validation", **at, "merge_step": merge_step}, {**scores, **logged})

    def ranked(self, steps: Collection[int]) -> list[int]:
        """The steps of those merges that were validated, the one that scored best first.

        Args:
            steps: of the merges in question, those of their newest snapshots.
        """
        if (metric := self.chosen(self.lower)) is None:
            return []
        sign = 1 if self.lower[metric] else -1
        scores = {
            row["merge_step"]: sign * score
            for row in list(self.rows)  # in one piece: training may add rows
            if row.get("merge_step") in steps and math.isfinite(score := _merged(row, metric))
        }
        return sorted(scores, key=lambda step: (scores[step], -step))

    def chosen(self, metrics: Collection[str]) -> str | None:
        """The metric that merges are compared by, of some with a known direction; ``None`` if it is none."""
        if self.select is not None:
            return self.select if self.select in metrics else None
        return min(metrics, key=lambda name: ("loss" not in name, name), default=None)

    def spread(
        self, metric: str, phase: str, newest: Mapping[str, SupportsFloat] | None = None
    ) -> float | None:
        """The standard deviation of a live metric's noise in the last 16 validations of a phase.

        Args:
            metric: its name.
            phase: of the learning rate; earlier phases do not count.
            newest: what the live weights score in a validation that is not noted yet.
        """
        values = [float(newest[metric])] if newest and metric in newest else []
        for row in reversed(list(self.rows)):
            if row["event"] == "validation":
                if row.get("phase") != phase or len(values) == _NEAR:
                    break
                if math.isfinite(value := float(row.get(metric, math.nan))):
                    values.append(value)
        return spread(values)

    def scores(self, merge_step: int) -> dict[str, dict[str, float]]:
        """What a merge and the live weights scored in its validation, by metric; empty if there was none.

        May be asked in the background, while training adds rows: hence the copy, which is made in one piece.
        """
        rows = [row for row in list(self.rows) if row.get("merge_step") == merge_step]
        scores = {
            metric: {"merged": _merged(row, metric), "live": float(row.get(metric, math.nan))}
            for row in rows[-1:]
            for metric in self.lower
        }
        return {m: found for m, found in scores.items() if all(map(math.isfinite, found.values()))}

    def state_dict(self) -> dict[str, Any]:
        """Everything as primitives."""
        return {"rows": [dict(row) for row in self.rows], "lower": dict(self.lower)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self.rows.clear()
        self.rows.extend(state.get("rows", ()))
        self.lower = dict(state.get("lower", {}))

    def _add(self, own: Mapping[str, Any], measured: Mapping[str, float]) -> None:
        self.rows.append({**own, **measured, **own})  # a module may log a metric that is called "step"


def _merged(row: Mapping[str, Any], metric: str) -> float:
    """What the merge scored; NaN if it was not measured."""
    return float(row.get(f"merged/{metric}", row.get(f"merged_{metric}", math.nan)))
