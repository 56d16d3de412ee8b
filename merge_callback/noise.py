"""How far a curve scatters around its trend."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation of a curve's noise; ``None`` with fewer than five values.

    Each value is compared with the middle of its neighbours, which takes the trend off. The difference has
    sqrt(1.5) times the noise's deviation, and the median of its size is that deviation times .6745.
    """
    if len(values) < 5:
        return None
    off = [abs(b - (a + c) / 2) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return statistics.median(off) / 0.6745 / math.sqrt(1.5)
