"""Tells a first warm-up from a learning rate that is raised by mistake, by what the loss does.

The rates don't tell: a warm-up that is stepped per epoch may hold its first rate for thousands of steps, and
then multiply it by 200. A higher rate may raise the loss for a while as well. But after a mistake the loss
takes back what the run has learned, and stays there. ``benchmarks/first_warmup.py`` has the real runs that
the numbers are from.
"""

from __future__ import annotations

from collections.abc import Sequence

from merge_callback.signals.baseline import middle

_FIRST = 5  # values whose median is the level at the start
_TAKEN_BACK = 0.25  # the share of what the run has learned; diverged byte-level GPTs take back .36 or more
_FAR = 4.0  # times as far as the threshold, for a run that has learned too little to tell by that

LASTING = 64
"""Values of which three in four are outliers after a divergence; good runs had 42 at most, counted later."""


def limit(baseline: float, threshold: float, start: Sequence[float]) -> float:
    """What a value must exceed to be an outlier in a first warm-up.

    It lies above the threshold, and a quarter of the way from the baseline back to the first values. If those
    lie within the threshold themselves, as in a continued pre-training, it lies four times as far from the
    baseline as the threshold.

    Args:
        baseline: the median before the rise.
        threshold: what an outlier exceeded then.
        start: the first values of the run; at least one.
    """
    first = middle(sorted(start[:_FIRST]))
    if first > threshold:
        return max(threshold, baseline + _TAKEN_BACK * (first - baseline))
    return baseline + _FAR * (threshold - baseline)
