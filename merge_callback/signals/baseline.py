"""What is normal for a number that is watched, and when a new level has become the normal one."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

from merge_callback.spike_options import HISTORY

ACTIVE_FROM = 64
"""Values from which a baseline can tell an outlier."""

_SIGMA = 1.4826  # the standard deviation of normal noise in units of its median absolute deviation

_TAIL_SIGMAS = 1.2816  # how many standard deviations of normal noise the 90 % quantile lies up

_OF_START = 0.01  # of the level a run begins at: below that share of it nothing is far away

_RECENT, _EVERY = 16, 8  # values whose median is looked at, and how often

_PAUSE, _LONGEST_PAUSE = 32, 512  # values between two questions about a rise

_MOSTLY = 0.75  # the share of outliers that makes a shift


class Baseline:
    """The last 128 values of a kind: their median, and the limit above which another is an outlier.

    The limit is ``median + max(k · σ, floor · max(|median|, level / 100))``. σ is the standard deviation that
    normal noise of this spread would have: the larger of ``1.4826 · MAD`` and ``1.4826 · (75 % quantile -
    median)``, the deviation of the upper half; where both are 0, ``(90 % quantile - median) / 1.28``. So a
    skewed loss, or one of which many values are equal (a hinge loss that is often exactly 0), has a scale.
    ``level`` is how large the values were at the start of the run.

    Args:
        k: how many standard deviations above the median the limit lies.
        floor: how far above the median it lies at least, as a share of the median.
        values: to begin with, oldest first.

    Example:
        >>> baseline = Baseline(6.0, 0.05, [2.0] * 100)
        >>> baseline.median, baseline.limit()
        (2.0, 2.1)
    """

    def __init__(self, k: float, floor: float, values: Iterable[float] = ()) -> None:
        self.k, self.floor = k, floor
        self.values = list(values)
        self._sorted = sorted(self.values)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def median(self) -> float:
        """NaN before there is a value."""
        return middle(self._sorted) if self._sorted else math.nan

    def least_limit(self, level: float = 0.0) -> float:
        """What the limit is at least. It takes no sorting, and most values lie below it."""
        median = self.median
        return median + self.floor * max(abs(median), _OF_START * level)

    def limit(self, level: float = 0.0) -> float:
        """Above which a value is an outlier; NaN where all values are 0 and so was the level.

        Args:
            level: of the values at the start of the run.
        """
        median = self.median
        absolute = middle(sorted([abs(value - median) for value in self._sorted]))
        deviation = _SIGMA * max(absolute, self._quantile(0.75) - median)
        deviation = deviation or (self._quantile(0.9) - median) / _TAIL_SIGMAS
        return (
            max(median + self.k * deviation, self.least_limit(level))
            if deviation or median or level
            else math.nan
        )

    def _quantile(self, share: float) -> float:
        return self._sorted[math.ceil(share * (len(self._sorted) - 1))]

    def admit(self, value: float) -> None:
        """Takes a value in as the newest one."""
        self.values.append(value)
        insort(self._sorted, value)
        if len(self.values) > HISTORY:
            del self._sorted[bisect_left(self._sorted, self.values.pop(0))]


class ShiftTest:
    """Finds out whether outliers are the rule by now: three in four of the last 128 finite values.

    A change of the data ends so, or a change of the loss itself.
    """

    def __init__(self, entries: Iterable[tuple[int, float]] = ()) -> None:
        self.entries = [(step, value) for step, value in entries]  # from an outlier on, oldest first

    def note(self, step: int, value: float, limit: float) -> None:
        """Notes an outlier, or what came after one."""
        if not math.isfinite(value):
            self.entries = []
            return
        self.entries = [*self.entries[1 - HISTORY :], (step, value)]
        while self.entries and self.entries[0][1] <= limit:
            del self.entries[0]

    def outliers(self, limit: float) -> list[float]:
        """The outliers, where they are the rule; else nothing."""
        if len(self.entries) < HISTORY:
            return []
        outliers = [value for _, value in self.entries if value > limit]
        return outliers if len(outliers) >= _MOSTLY * HISTORY else []


class RiseTest:
    """Finds a rise that is too small, or too slow, to make outliers in a row.

    Every 8 values the median of the last 16 is held against the older half of the baseline: a slow rise has
    got into the other half by then. It must lie above ``median + max(k / 2 · σ, floor · max(|median|,
    level))`` of that half. What is noise for one value is far off for a median of 16 of them.

    Data that become harder do the same: so a rise is only a reason to ask, and after each answer that it was
    the data the next question waits twice as long, up to 512 values.

    Args:
        k: of the baseline.
        floor: of the baseline.
        recent: the last steps and values.
        pause: values until the next question may come.
        asked: how long the last pause was.
    """

    def __init__(
        self,
        k: float,
        floor: float,
        recent: Iterable[tuple[int, float]] = (),
        pause: int = 0,
        asked: int = _PAUSE // 2,
    ) -> None:
        self.k, self.floor = k, floor
        self.recent = deque(((step, value) for step, value in recent), maxlen=_RECENT)
        self.pause, self.asked = pause, asked

    def onset(
        self, step: int, value: float, baseline: Baseline, level: float
    ) -> tuple[int, float, float] | None:
        """Reads a value; where there is a rise, gives its first step, the median before it and the limit."""
        self.pause -= 1
        self.recent.append((step, value))
        if self.pause > 0 or step % _EVERY or len(self.recent) < _RECENT or len(baseline) < HISTORY:
            return None
        now = middle(sorted(value for _, value in self.recent))
        if now <= baseline.least_limit(level):
            return None
        older = Baseline(self.k / 2, self.floor, baseline.values[: HISTORY // 2])
        limit = max(older.limit(level), older.median + self.floor * level)
        if not now > limit:
            return None
        self.asked = min(2 * self.asked, _LONGEST_PAUSE)
        self.pause = self.asked
        return self.recent[0][0], older.median, limit


def middle(ordered: list[float]) -> float:
    """The median of values that are in order; there is at least one."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
