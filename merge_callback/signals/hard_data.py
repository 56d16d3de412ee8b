"""Losses that are high because of the data, and what they look like."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from merge_callback.signals.baseline import Baseline

_FEW = 16  # values below which their spread can't be told


class HardData:
    """The outliers of streaks that were not the weights' fault: they make a baseline of their own.

    Args:
        k: how many standard deviations from their median such values lie at most.
        floor: how far from it they may always lie, as a share of it.
        values: that are known, oldest first.
        longest: outliers of the longest such streak.
    """

    def __init__(self, k: float, floor: float, values: Iterable[float] = (), longest: int = 0) -> None:
        self.baseline, self.longest = Baseline(k, floor, values), longest

    def range(self, clean: Baseline, level: float) -> tuple[float, float]:
        """Where a value looks like these: between the two; nowhere, if none are known.

        What lies below is no longer hard data, and not clean either: it may be what they did to the weights.

        Args:
            clean: the baseline of the other values.
            level: of the values at the start of the run.
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
        """Takes outliers in: as further ones of the kind that is known, or as a kind of their own."""
        finite = list(filter(math.isfinite, outliers))
        if finite and max(finite) > self.range(clean, level)[1]:
            self.baseline = Baseline(self.baseline.k, self.baseline.floor)
        for value in finite:
            self.baseline.admit(value)
