"""The normal level of a watched number, and the tests for a new level."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

from merge_callback.spike_options import HISTORY

ACTIVE_FROM = 64
"""Number of values from which a baseline can judge outliers."""

_SIGMA = 1.4826  # the standard deviation of normal noise in units of its median absolute deviation

_TAIL_SIGMAS = 1.2816  # the 90 % quantile of normal noise, in standard deviations above its median

_OF_START = 0.01  # the floor is a share of at least this much of the initial level

_RECENT, _EVERY = 16, 8  # values whose median is tested, and the steps between two tests

_PAUSE, _LONGEST_PAUSE = 32, 512  # values between two reports of a rise, at first and at most

_MOSTLY = 0.75  # the share of outliers that makes a shift


class Baseline:
    """The last 128 values of a kind: their median, and the limit above which another is an outlier.

    The limit is ``median + max(k · σ, floor · max(|median|, level / 100))``. σ is the standard deviation that
    normal noise of this spread would have: the larger of ``1.4826 · MAD`` and ``1.4826 · (75 % quantile -
    median)``, the deviation of the upper half; if both are 0, ``(90 % quantile - median) / 1.28``. So a
    skewed loss, or one with many equal values (a hinge loss that is often exactly 0), has a scale. ``level``
    is the magnitude of the values at the start of the run.

    Args:
        k: the limit's distance from the median, in standard deviations.
        floor: the limit's least distance from the median, as a share of the median.
        values: the initial values, oldest first.

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
        """The median of the values; NaN before there is one."""
        return middle(self._sorted) if self._sorted else math.nan

    def least_limit(self, level: float = 0.0) -> float:
        """The least possible limit. It needs no sorting, and most values lie below it."""
        median = self.median
        return median + self.floor * max(abs(median), _OF_START * level)

    def limit(self, level: float = 0.0) -> float:
        """The limit above which a value is an outlier; NaN if all values are 0, and the level, too.

        Args:
            level: the magnitude of the values at the start of the run.
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
        """Adds a value as the newest one."""
        self.values.append(value)
        insort(self._sorted, value)
        if len(self.values) > HISTORY:
            del self._sorted[bisect_left(self._sorted, self.values.pop(0))]


class ShiftTest:
    """Tests whether outliers have become normal: three in four of the last 128 finite values.

    That happens if the data change, or the loss itself.

    Args:
        entries: the last steps and values, oldest first.
    """

    def __init__(self, entries: Iterable[tuple[int, float]] = ()) -> None:
        self.entries = [(step, value) for step, value in entries]  # the first one is an outlier; oldest first

    def note(self, step: int, value: float, limit: float) -> None:
        """Notes an outlier, or a value after one."""
        if not math.isfinite(value):
            self.entries = []
            return
        self.entries = [*self.entries[1 - HISTORY :], (step, value)]
        while self.entries and self.entries[0][1] <= limit:
            del self.entries[0]

    def outliers(self, limit: float, of: int = HISTORY) -> list[tuple[int, float]]:
        """Step and value of the outliers among the last ``of``, if three in four are; else an empty list."""
        if len(self.entries) < of:
            return []
        outliers = [entry for entry in self.entries[-of:] if entry[1] > limit]
        return outliers if len(outliers) >= _MOSTLY * of else []


class RiseTest:
    """Finds a rise that is too small, or too slow, to cause consecutive outliers.

    Every 8 values the median of the last 16 is compared with the older half of the baseline, because a slow
    rise has reached the newer half by then. It must lie above ``median + max(k / 2 · σ, floor · max(|median|,
    level))`` of that half. A deviation that is noise for one value is large for a median of 16.

    Harder data cause a rise, too. So a rise is only a reason to test the weights, and each report doubles the
    pause before the next one, up to 512 values.

    Args:
        k: the baseline's.
        floor: the baseline's.
        recent: the last steps and values.
        pause: values until the next report may come.
        asked: length of the last pause.
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
        """Reads a value; if there is a rise, returns its first step, the median before it and the limit."""
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
    """The median of sorted values; there must be at least one."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
