"""Detects a loss that creeps up, which no rule for spikes sees, and scores how spiky a run is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from merge_callback.signals.baseline import middle

_BLOCK = 64  # losses whose median is one point of the curve
_POINTS = 4  # points whose median is the level

DRIFT_STEPS = _BLOCK * _POINTS
"""Number of losses that a level is computed from."""

_SCORED = 10_000  # steps that the spike score covers
_DEVIATIONS = 7.0  # distance from the mean at which a loss counts as a spike
_AVERAGED = 1_000  # losses that the mean is taken over


class Drift:
    """Finds a slow rise: compares the level of the last 256 losses with the best level of the run.

    The level is a median of medians, so that neither noise nor a spike moves it. A rise counts from
    ``max(5 % of the best level, half of what makes an outlier)`` on; each further rise by that much is
    reported again. A change of the data is not a drift: after one, call ``restart()``.

    Args:
        floor: the share of the best level that makes a rise.
    """

    def __init__(self, floor: float = 0.05) -> None:
        self.floor = floor
        self.best = math.inf
        self._block: list[float] = []
        self._points: list[float] = []

    def observe(self, value: float, margin: Callable[[], float]) -> tuple[float, float] | None:
        """Reads the loss of one optimizer step.

        Args:
            value: the loss.
            margin: returns how far above the baseline an outlier lies; NaN if unknown. It is called once in
                64 steps, because it needs a sort.

        Returns:
            The best level and the present one, if the loss has drifted up; else ``None``.
        """
        if not math.isfinite(value):
            return None
        self._block.append(value)
        if len(self._block) < _BLOCK:
            return None
        self._points = [*self._points[1 - _POINTS :], middle(sorted(self._block))]
        self._block = []
        if len(self._points) < _POINTS:
            return None
        level, best = middle(sorted(self._points)), self.best
        self.best = min(best, level)
        known = margin()
        rise = max(self.floor * abs(self.best), known / 2 if math.isfinite(known) else math.inf)
        if level - self.best <= rise:
            return None
        self.best = level
        return best, level

    def restart(self) -> None:
        """Forgets all levels, after the data or the learning rate have changed."""
        self.best, self._block, self._points = math.inf, [], []

    def state_dict(self) -> dict[str, Any]:
        """The state as primitives."""
        return {"best": self.best, "block": list(self._block), "points": list(self._points)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self.best, self._block, self._points = state["best"], list(state["block"]), list(state["points"])


class SpikeScore:
    """The share of the last 10,000 steps whose loss lies 7 standard deviations or more off the mean.

    Mean and standard deviation are taken over the 1,000 losses before it, as in OLMo 2 (arXiv 2501.00656,
    section 3.1) and AdaGC (arXiv 2502.11034). A loss that is not finite counts, and is left out of both.
    """

    def __init__(self) -> None:
        self._pending: list[float] = []  # not counted yet; counting many at once takes half the time
        self._seen: deque[float] = deque()
        self._sum = self._squares = self._shift = 0.0
        self._off: deque[int] = deque()  # the steps that count
        self._steps = 0

    @property
    def value(self) -> float:
        """The score, 0 to 1."""
        self._count()
        return len(self._off) / min(self._steps, _SCORED) if self._steps else 0.0

    def observe(self, value: float) -> None:
        """Reads the loss of one optimizer step."""
        self._pending.append(value)
        if len(self._pending) == _BLOCK:
            self._count()

    def _count(self) -> None:
        pending, self._pending = self._pending, []
        for value in pending:
            self._count_one(value)

    def _count_one(self, value: float) -> None:
        self._steps += 1
        if self._off and self._off[0] <= self._steps - _SCORED:
            self._off.popleft()
        if not math.isfinite(value):
            self._off.append(self._steps)
            return
        seen, n = self._seen, len(self._seen)
        if n == 0:
            self._shift = value  # keeps the sums small, so that they lose no digits
        value -= self._shift
        if n >= _BLOCK:
            mean = self._sum / n
            variance = max(0.0, self._squares / n - mean * mean)
            if (value - mean) ** 2 >= _DEVIATIONS**2 * variance and value != mean:
                self._off.append(self._steps)
        seen.append(value)
        self._sum += value
        self._squares += value * value
        if n == _AVERAGED:
            oldest = seen.popleft()
            self._sum -= oldest
            self._squares -= oldest * oldest
        if self._steps % _AVERAGED == 0:  # removes accumulated rounding errors
            self._sum, self._squares = math.fsum(seen), math.fsum(v * v for v in seen)

    def state_dict(self) -> dict[str, Any]:
        """The state as primitives."""
        self._count()
        sums = [self._sum, self._squares, self._shift]
        return {"seen": list(self._seen), "sums": sums, "off": list(self._off), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self._seen, self._off, self._steps = deque(state["seen"]), deque(state["off"]), state["steps"]
        self._sum, self._squares, self._shift = state["sums"]
