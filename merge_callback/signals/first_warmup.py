"""Tells a first warm-up from a learning rate that is raised by mistake, by what the loss does.

The rates don't tell: a warm-up that is stepped per epoch may hold its first rate for thousands of steps, and
then multiply it by 200. A higher rate may raise the loss for a while as well. But after a mistake the loss
takes back what the run has learned, and stays there. Of real runs whose first rate was multiplied by 2 to
200 (``benchmarks/first_warmup.py``), those that got better had at most 42 outliers in any 64 losses, those
that diverged 50 or more.
"""

from __future__ import annotations

from collections.abc import Sequence

from merge_callback.signals.baseline import Baseline, middle

_FIRST = 5  # values whose median is the level at the start
_TAKEN_BACK = 0.25  # the share of what the run has learned; a divergence takes back half of it or more
_FAR = 4.0  # times as far as the threshold, for a run that has learned too little to tell by that

LASTING = 64
"""Values of which three in four are outliers after a divergence."""


def limit(clean: Baseline, start: Sequence[float], level: float) -> float:
    """What a value must exceed to be an outlier in a first warm-up.

    It lies above the threshold, and a quarter of the way from the baseline back to the first values. If those
    lie within the threshold themselves, as in a continued pre-training, it lies four times as far from the
    baseline as the threshold.

    Args:
        clean: the baseline; it must have values.
        start: the first values of the run.
        level: the magnitude of the values at the start of the run.
    """
    baseline, threshold = clean.median, clean.limit(level)
    first = middle(sorted(start[:_FIRST]))
    if first > threshold:
        return max(threshold, baseline + _TAKEN_BACK * (first - baseline))
    return baseline + _FAR * (threshold - baseline)
