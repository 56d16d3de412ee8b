"""The forecast: what the live weights would score if the learning rate decayed now.

A merge of the stable phase is ahead of the live weights, and annealing brings them further still. Over forks
of small language models that annealed for a quarter of the steps before, the annealed model was ahead of the
merge by about as much as the merge was ahead of the live weights, give or take a third: the error says so
(``benchmarks/forecast.py``).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

VALIDATIONS = 5
"""So many gains are looked at."""

LEVEL = 0.7
"""The least of them over the largest, from which on they count as level: while they rise, no rule holds."""

SNAPSHOTS = 8
"""A merge of fewer gains less than the rule was measured for."""

SHARES = {True: (0.98, 0.27), False: (0.99, 0.26)}
"""Mean and standard deviation of that share, for losses (lower is better), and for accuracies."""

OWN = {True: 0.08, False: 0.17}
"""How far off a run's own earlier decay was as a forecast of what a later one adds to the merge (the root of
the mean square, over what it adds), for losses, and for accuracies."""


def forecast(
    merged: float, gains: Sequence[float], lower_is_better: bool, own: float | None = None
) -> tuple[float, float] | None:
    """What a decay over a quarter of the steps so far would give, and how far off that may be.

    If the run has decayed before, it is what a decay as that one would give.

    Args:
        merged: what the merge scores.
        gains: of the last merges, oldest first, positive if they are better than the live weights.
        lower_is_better: of this metric.
        own: what an earlier decay of the run has added to the last merge before it.

    Returns:
        The forecast and two standard deviations of its error; ``None`` while the gains are not level.
    """
    last = gains[-VALIDATIONS:]
    if len(last) < VALIDATIONS or max(last) <= 0 or min(last) < LEVEL * max(last):
        return None
    if own is not None:
        return merged + own, 2 * OWN[lower_is_better] * abs(own)
    share, spread = SHARES[lower_is_better]
    gain = statistics.mean(last)
    return merged - share * gain * (1 if lower_is_better else -1), 2 * spread * gain
