"""Tells a loss spike from noise, from a spike that heals by itself, and from a shift of the data."""

from __future__ import annotations

import copy
import math
from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

HISTORY = 128
"""Clean values that make the baseline; and values after which most being outliers is the new normal."""

ACTIVE_FROM = 64
"""Clean values from which a finite value can be an outlier."""

_FIRST = 16  # values after a restore by which changed data are judged

_MOSTLY = 0.75  # the share of outliers that makes a shift

_SIGMA = 1.4826  # the standard deviation of normal noise in units of its median absolute deviation


@dataclass(frozen=True)
class SpikeEvent:
    """What a detector has to say: a spike, or a shift that it now takes for the new normal.

    ``onset`` is the step of the first outlier, ``step`` the one whose value settled it, ``values`` are the
    outliers (of a shift those among its 128 values, of a spike the last 128). ``baseline`` and ``threshold``
    are those the outliers were judged by, NaN where there were too few clean values for one.
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
    active: bool = True  # whether the last value was judged
    onset: int | None = None  # step of the streak's first outlier
    reported: bool = False  # whether this streak was reported
    trouble: list[tuple[int, float]] = field(default_factory=list)  # the last 128, from an outlier on
    first: list[float] | None = None  # values since a restore, while the data may have changed
    unmoved: int = 1  # how many of them are of weights as they were restored
    clean_in_a_row: int = 0


class SpikeDetector:
    """Watches one number per optimizer step, the loss or the gradient norm. Pure: no device, no trainer.

    A value is an outlier above ``median + max(k · 1.4826 · MAD, floor · |median|)`` of the last 128 clean
    values; outliers never enter that baseline, so neither a spike nor a NaN can poison it.

    * A finite **spike** is ``patience`` outliers in a row: most spikes heal by themselves.
    * A **non-finite** value is a spike at once; after a step that fp16 loss scaling skipped, in a row only.
    * Each streak is reported once.
    * A **shift**: where three in four of 128 finite values are outliers, these are the new baseline. A
      change of the data ends so.
    * After a restore, the first values are those of weights known to be good. If more than a quarter of
      them are outliers all the same, the data are the cause, and the first 16 values are what a spike is
      judged by, until 16 in a row are clean by the old measure again or the shift is complete.

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
        """What a value must exceed to be an outlier; NaN before 64 clean values, or where most are 0."""
        return self._limit(self._sorted) if len(self._sorted) >= ACTIVE_FROM else math.nan

    def observe(
        self, step: int, value: float, active: bool = True, skipped: bool = False
    ) -> SpikeEvent | None:
        """Reads the value of one optimizer step.

        Args:
            step: the optimizer step; only ever grows.
            value: its loss, or gradient norm.
            active: ``False`` while the learning rate warms up: a finite value is then never an outlier, and
                those before, at another rate, are forgotten.
            skipped: whether the step was skipped because its scaled fp16 gradients overflowed. That is how
                loss scaling works, and no spike.

        Returns:
            What there is to report, as a rule nothing.
        """
        trace = self._trace
        if skipped and math.isfinite(value):
            return None
        if trace.active and not active:
            trace.clean, self._sorted = [], []
        trace.active = active
        outlier = self._is_outlier(value, active)
        if outlier or trace.trouble:
            self._note_trouble(step, value, active)
        if trace.first is not None:
            self._note_first(trace.first, value, outlier)
        if not outlier:
            if trace.onset is not None:
                trace.outliers, trace.onset, trace.reported = [], None, False
            self._admit(value)
            return None
        if trace.onset is None:
            trace.onset = step
        trace.outliers = [*trace.outliers[1 - HISTORY :], value]
        if len(trace.trouble) == HISTORY and (event := self._settle(step)):
            return event
        if not trace.reported and self._is_spike(skipped):
            trace.reported = True
            return self._event("spike", step, trace.onset, list(trace.outliers))
        return None

    def restored(self, unmoved: int) -> None:
        """Ends the streak: the weights are now those of a merge of clean snapshots.

        Args:
            unmoved: the coming values that are of these weights, but for the noise of a few small updates.
        """
        clean, active = self._trace.clean, self._trace.active
        self._trace = _Trace(clean, active=active, first=[], unmoved=min(unmoved, self.patience))

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as JSON types (NaN and infinities as Python's ``json`` writes them)."""
        return asdict(self._trace)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict`` as if there had been no break."""
        self._trace = _Trace(**copy.deepcopy(dict(state)))
        self._trace.trouble = [(step, value) for step, value in state["trouble"]]
        self._sorted = sorted(self._trace.clean)

    def _is_outlier(self, value: float, active: bool) -> bool:
        if not math.isfinite(value):
            return True
        if not active or len(self._sorted) < ACTIVE_FROM:
            return False
        middle = _middle(self._sorted)  # the deviation takes a sort, which most values don't need
        return value > middle + self.floor * abs(middle) and value > self.threshold

    def _is_spike(self, skipped: bool) -> bool:
        outliers = self._trace.outliers
        if not math.isfinite(outliers[-1]) and not skipped:
            return True
        ceiling = self._ceiling
        return len(outliers) >= self.patience and not any(v <= ceiling for v in outliers[-self.patience :])

    @property
    def _ceiling(self) -> float:
        """What a spike must exceed: the threshold, or what it would be for changed data."""
        first, threshold = self._trace.first, self.threshold
        if not first:
            return threshold
        if len(first) == _FIRST:
            return max(threshold, self._limit(sorted(first)))
        top, baseline = max(first[: self._trace.unmoved]), self.baseline
        return top + (threshold - baseline) * (max(1.0, top / baseline) if baseline > 0 else 1.0)

    def _limit(self, ordered: list[float]) -> float:
        """The threshold that these values make; NaN where most are 0: that has no scale."""
        middle = _middle(ordered)
        deviation = _middle(sorted([abs(value - middle) for value in ordered]))
        return middle + (max(self.k * _SIGMA * deviation, self.floor * abs(middle)) or math.nan)

    def _note_first(self, first: list[float], value: float, outlier: bool) -> None:
        trace = self._trace
        if not math.isfinite(value):
            return
        trace.clean_in_a_row = 0 if outlier else trace.clean_in_a_row + 1
        if len(first) < _FIRST:
            first.append(value)
        unchanged = len(first) == trace.unmoved and sorted(first)[trace.unmoved // 4] <= self.threshold
        if unchanged or trace.clean_in_a_row == _FIRST:
            trace.first = None

    def _note_trouble(self, step: int, value: float, active: bool) -> None:
        """Notes an outlier, or what came after one."""
        trace = self._trace
        if not active or not math.isfinite(value):
            trace.trouble = []
        else:
            trace.trouble = [*trace.trouble[1 - HISTORY :], (step, value)]
            while trace.trouble and trace.trouble[0][1] <= self.threshold:
                del trace.trouble[0]

    def _settle(self, step: int) -> SpikeEvent | None:
        """Takes the outliers for the new baseline, where they are the rule by now."""
        (onset, _), threshold = self._trace.trouble[0], self.threshold
        outliers = [value for _, value in self._trace.trouble if value > threshold]
        if len(outliers) < _MOSTLY * HISTORY:
            return None
        event = self._event("shift", step, onset, outliers)
        self._trace = _Trace(clean=list(outliers))
        self._sorted = sorted(outliers)
        return event

    def _admit(self, value: float) -> None:
        clean = self._trace.clean
        clean.append(value)
        insort(self._sorted, value)
        if len(clean) > HISTORY:
            del self._sorted[bisect_left(self._sorted, clean.pop(0))]

    def _event(
        self, kind: Literal["spike", "shift"], step: int, onset: int, values: list[float]
    ) -> SpikeEvent:
        return SpikeEvent(kind, self.watched, onset, step, values, self.baseline, self.threshold)


def _middle(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
