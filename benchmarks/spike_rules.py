"""Our rule for loss spikes and three published ones: each gives the steps at which it raises an alarm.

The published ones are written down from their definitions: Lightning's ``SpikeDetection`` (2.6: off the
running mean over 10 values by twice that, and rising), OLMo-core's skip rule (more than 6 standard deviations
off the mean of the last 128), llm-foundry's ``KillLossSpike`` (more than 4 in a row above twice the mean of
the last 100).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable

import torch

from merge_callback.signals.lr_phase import Warmup
from merge_callback.signals.spike_detector import SpikeDetector

WARMUP = 100
"""Steps of every run's warm-up, in which no rule is asked."""

Rule = Callable[[list[float]], list[int]]


def ours(losses: list[float]) -> list[int]:
    """Steps at which the detector reports a spike."""
    detector = SpikeDetector()
    rates = [Warmup.FIRST] * WARMUP + [Warmup.NONE] * len(losses)
    events = [detector.observe(step, loss, rates[step]) for step, loss in enumerate(losses)]
    return [event.step for event in events if event is not None and event.kind == "spike"]


def lightning(losses: list[float], window: int = 10, rtol: float = 2.0) -> list[int]:
    """``SpikeDetection`` by default: NaN, or above the last value and off the mean by ``rtol`` of it."""
    seen: deque[float] = deque(maxlen=window)
    last, alarms = 0.0, []
    for step, loss in enumerate(losses):
        mean = statistics.fmean(seen) if seen else math.nan
        off = loss > last and abs(loss - mean) >= abs(rtol * mean)
        if step >= WARMUP and (not math.isfinite(loss) or off):
            alarms.append(step)
            continue
        seen.append(loss)
        last = loss
    return alarms


def olmo(losses: list[float], window: int = 128, sigma: float = 6.0) -> list[int]:
    """``SkipStepOptimizer``: skips what lies more than 6 standard deviations off; all enters the window.

    A step is taken where the comparison is true, and with NaN it never is: one NaN in the window skips all.
    """
    seen: deque[float] = deque(maxlen=window)
    alarms = []
    for step, loss in enumerate(losses):
        if len(seen) >= window // 2 and step >= WARMUP:
            values = torch.tensor(list(seen))
            if not abs(loss - float(values.mean())) / float(values.std()) <= sigma:
                alarms.append(step)
        seen.append(loss)
    return alarms


def llm_foundry(
    losses: list[float], window: int = 100, multiple: float = 2.0, patience: int = 4
) -> list[int]:
    """``KillLossSpike``: more than ``patience`` in a row at or above twice the mean of the last 100."""
    seen: deque[float] = deque(maxlen=window)
    count, alarms = 0, []
    for step, loss in enumerate(losses):
        if len(seen) == window:
            count = count + 1 if loss >= multiple * statistics.fmean(seen) else 0
            if count > patience:
                alarms.append(step)
        seen.append(loss)
    return alarms


RULES: dict[str, Rule] = {
    "ours": ours,
    "Lightning": lightning,
    "OLMo-core": olmo,
    "llm-foundry": llm_foundry,
}
