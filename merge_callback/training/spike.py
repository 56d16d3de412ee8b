"""Tells a loss spike from noise, from a spike that heals by itself, and from a shift of the data."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

HISTORY = 128
"""Clean values that make the baseline; and outliers in a row after which they are the new normal."""

ACTIVE_FROM = 64
"""Clean values from which a finite value can be an outlier."""

_SIGMA = 1.4826  # the standard deviation of normal noise in units of its median absolute deviation


@dataclass(frozen=True)
class SpikeEvent:
    """What a detector has to say: a spike, or a shift that it now takes for the new normal.

    ``onset`` is the step of the first outlier, ``step`` the one whose value settled it, ``values`` are the
    outliers (the last 128). ``baseline`` and ``threshold`` are those the outliers were judged by, NaN where
    there were too few clean values for one.
    """

    kind: Literal["spike", "shift"]
    watched: str
    onset: int
    step: int
    values: list[float]
    baseline: float
    threshold: float

    @property
    def trigger(self) -> str:
        """What gave it away, e.g. ``"loss"`` or ``"non-finite loss"``."""
        finite = all(map(math.isfinite, self.values))
        return self.watched if finite else f"non-finite {self.watched}"


@dataclass
class _Trace:
    """All that is remembered."""

    clean: list[float] = field(default_factory=list)  # the baseline, oldest first
    outliers: list[float] = field(default_factory=list)  # of the current streak, oldest first
    onset: int | None = None  # step of the streak's first outlier
    reported: bool = False  # whether this streak was reported
    worse_than: float | None = None  # since a restore, until a clean value: the outliers' median before it


class SpikeDetector:
    """Watches one number per optimizer step, the loss or the gradient norm. Pure: no device, no trainer.

    A value is an outlier above ``median + max(k · 1.4826 · MAD, floor · |median|)`` of the last 128 clean
    values; outliers never enter that baseline, so neither a spike nor a NaN can poison it.

    * A finite **spike** is ``patience`` outliers in a row: most spikes heal by themselves.
    * A **non-finite** value is a spike at once; after a step that fp16 loss scaling skipped, in a row only.
    * Each streak is reported once.
    * A **shift**: 128 finite outliers in a row are the new baseline. A change of the data ends so.
    * After a restore, the first loss is that of weights known to be good. If it is an outlier all the same,
      and so are the next, the weights are not the cause: nothing is reported, unless the outliers are
      higher than those before the restore, until one value is clean or the shift is complete.

    Args:
        k: how many robust standard deviations above the median an outlier lies.
        floor: how far above the median it lies at least, as a share of the median.
        patience: finite outliers in a row that make a spike.
        watched: the number's name, for the reports.

    Example:
        >>> detector = SpikeDetector(patience=2)
        >>> events = [detector.observe(step, 2.0 + step % 3 / 100) for step in range(100)]
        >>> any(events), detector.observe(100, 9.0), detector.observe(101, 9.0).onset
        (False, None, 100)
    """

    def __init__(self, k: float = 6.0, floor: float = 0.05, patience: int = 5, watched: str = "loss") -> None:
        self.k, self.floor, self.patience, self.watched = k, floor, patience, watched
        self._trace = _Trace()
        self._sorted: list[float] = []

    @property
    def onset(self) -> int | None:
        """Step of the first outlier of the current streak; ``None`` while all is well."""
        return self._trace.onset

    @property
    def baseline(self) -> float:
        """Median of the last clean values; NaN before there is one."""
        return _middle(self._sorted) if self._sorted else math.nan

    @property
    def threshold(self) -> float:
        """What a value must exceed to be an outlier; NaN before there are 64 clean values."""
        if len(self._sorted) < ACTIVE_FROM:
            return math.nan
        middle = self.baseline
        deviation = _middle(sorted([abs(value - middle) for value in self._sorted]))
        return middle + max(self.k * _SIGMA * deviation, self.floor * abs(middle))

    def observe(
        self, step: int, value: float, active: bool = True, skipped: bool = False
    ) -> SpikeEvent | None:
        """Reads the value of one optimizer step.

        Args:
            step: the optimizer step; only ever grows.
            value: its loss, or gradient norm.
            active: ``False`` while the learning rate warms up: a finite value is then never an outlier.
            skipped: whether the step was skipped because its scaled fp16 gradients overflowed. That is how
                loss scaling works, and no spike.

        Returns:
            What there is to report, as a rule nothing.
        """
        trace = self._trace
        if skipped and math.isfinite(value):
            return None
        if not self._is_outlier(value, active):
            trace.outliers, trace.onset, trace.reported, trace.worse_than = [], None, False, None
            self._admit(value)
            return None
        if trace.onset is None:
            trace.onset = step
        trace.outliers = [*trace.outliers[1 - HISTORY :], value]
        event = self._event("spike", step)
        if self._is_shift():
            return self._settle(step)
        if not trace.reported and self._is_spike(skipped):
            trace.reported = True
            return event
        return None

    def restored(self) -> None:
        """Ends the streak: the weights are now those of a merge of clean snapshots."""
        trace = self._trace
        if trace.outliers:  # it may be another number that gave the spike away
            finite = all(map(math.isfinite, trace.outliers))
            trace.worse_than = _height(trace.outliers) if finite else math.inf
        trace.outliers, trace.onset, trace.reported = [], None, False

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as JSON types (NaN and infinities as Python's ``json`` writes them)."""
        return asdict(self._trace)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict`` as if there had been no break."""
        self._trace = _Trace(**state)
        self._trace.clean, self._trace.outliers = list(state["clean"]), list(state["outliers"])
        self._sorted = sorted(self._trace.clean)

    def _is_outlier(self, value: float, active: bool) -> bool:
        if not math.isfinite(value):
            return True
        if not active or len(self._sorted) < ACTIVE_FROM:
            return False
        middle = self.baseline  # the deviation takes a sort, which most values don't need
        return value > middle + self.floor * abs(middle) and value > self.threshold

    def _is_spike(self, skipped: bool) -> bool:
        trace = self._trace
        if not math.isfinite(trace.outliers[-1]) and not skipped:
            return True
        if len(trace.outliers) < self.patience:
            return False
        height = _height(trace.outliers[-self.patience :])
        return trace.worse_than is None or height > trace.worse_than or math.isinf(height)

    def _is_shift(self) -> bool:
        outliers = self._trace.outliers
        return len(outliers) == HISTORY and all(map(math.isfinite, outliers))

    def _settle(self, step: int) -> SpikeEvent:
        """Takes the outliers for the new baseline."""
        event = self._event("shift", step)
        self._trace = _Trace(clean=event.values)
        self._sorted = sorted(event.values)
        return event

    def _admit(self, value: float) -> None:
        clean = self._trace.clean
        clean.append(value)
        insort(self._sorted, value)
        if len(clean) > HISTORY:
            del self._sorted[bisect_left(self._sorted, clean.pop(0))]

    def _event(self, kind: Literal["spike", "shift"], step: int) -> SpikeEvent:
        trace = self._trace
        onset = step if trace.onset is None else trace.onset
        values = list(trace.outliers)
        return SpikeEvent(kind, self.watched, onset, step, values, self.baseline, self.threshold)


def _height(outliers: list[float]) -> float:
    """Their median, a NaN taken for the highest."""
    return _middle(sorted(value if math.isfinite(value) else math.inf for value in outliers))


def _middle(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
