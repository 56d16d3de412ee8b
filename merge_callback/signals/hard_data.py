"""The range of losses that are high because of the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from merge_callback.signals.baseline import Baseline

_FEW = 16  # with fewer values, their spread is unknown


class HardData:
    """The outliers of streaks that were not the weights' fault; they have a baseline of their own.

    Args:
        k: the largest distance of such values from their median, in standard deviations.
        floor: the distance from it that is always allowed, as a share of it.
        values: the known values, oldest first.
        longest: number of outliers in the longest such streak.
    """

    def __init__(self, k: float, floor: float, values: Iterable[float] = (), longest: int = 0) -> None:
        self.baseline, self.longest = Baseline(k, floor, values), longest

    def range(self, clean: Baseline, level: float) -> tuple[float, float]:
        """The lowest and the highest value that count as hard data; an empty range if none are known.

        Outliers below are no longer hard data, but not clean either: hard data may have harmed the weights.

        Args:
            clean: the baseline of the other values.
            level: the magnitude of the values at the start of the run.
        """
        hard = self.baseline
        if not hard.values:
            return math.inf, -math.inf
        if len(hard) >= _FEW:
            limit = hard.limit(level)
            return 2 * hard.median - limit, limit
        top, median = max(hard.values), clean.median
        margin = (clean.limit(level) - median) * (max(1.0, top / median) if median > 0 else 1.0)
        return min(hard.values) - margin, top + margin

    def note(self, outliers: Sequence[float], clean: Baseline, level: float) -> None:
        """Adds outliers: to the known values, or as a new set if one lies above their range."""
        finite = list(filter(math.isfinite, outliers))
        if finite and max(finite) > self.range(clean, level)[1]:
            self.baseline = Baseline(self.baseline.k, self.baseline.floor)
        for value in finite:
            self.baseline.admit(value)
