"""Distinguishes a loss spike from noise, hard data, a spike that heals by itself, and a shift."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from merge_callback.signals import first_warmup
from merge_callback.signals.baseline import ACTIVE_FROM, Baseline, RiseTest, ShiftTest, middle
from merge_callback.signals.hard_data import HardData
from merge_callback.signals.lr_phase import Warmup
from merge_callback.signals.spike_event import SpikeEvent
from merge_callback.spike_options import HISTORY

__all__ = ["ACTIVE_FROM", "HISTORY", "SpikeDetector"]

_RETURNED = 16  # consecutive values nearer to the baseline before a shift that restore it

# While the rate rises to a former one, an outlier has to exceed the baseline by
_FAR = 4.0  # this many times the usual distance of the threshold,
_TIMES = 2.0  # and by this many times the baseline,
_AS_AT_FIRST = 0.5  # and to reach this share of the level at the start of the run.


@dataclass
class _Streak:
    """Consecutive outliers."""

    onset: int
    outliers: list[float] = field(default_factory=list)  # the last 128, oldest first
    length: int = 0
    beyond: int = 0  # how many of the newest lie outside the hard data, too
    ask_at: int | None = None  # the length at which it is reported although it looks like hard data
    reported: bool = False  # and not answered yet
    answers: int = 0


@dataclass
class _AfterRestore:
    """The first values of restored weights, until it is known whether the data have changed, too."""

    unmoved: int  # how many reflect the restored weights
    values: list[float] = field(default_factory=list)


@dataclass
class _BeforeShift:
    """The clean values before the last shift."""

    onset: int  # the shift's first step
    clean: list[float]
    median: float
    low: int = 0  # consecutive values nearer to the old median than to the new baseline


class SpikeDetector:
    """Watches one number per optimizer step, the loss or the gradient norm. Pure: no device, no trainer.

    It is in one of three states. *Calm*: a value above the limit of the last 128 clean values (see
    ``Baseline``) is an outlier; outliers never enter that baseline, so neither a spike nor a NaN can poison
    it. *Streak*: consecutive outliers.

    * A **spike** is ``patience`` consecutive outliers, because most shorter ones heal by themselves. A value
      that is not finite is an outlier like others, except if the weights are broken: then it is a spike at
      once.
    * The answer to a spike may be ``acquit()``: the weights are sound, and the cause is **hard data**. Its
      values get a baseline of their own, and further values within it are only reported after 1, 2, 4, …
      further outliers.
    * A streak that ends by itself after it was reported was hard data as well. A later one **like it** is
      reported when it is twice as long.
    * A **rise**: recent values lie clearly above earlier ones, although few are outliers (see ``RiseTest``).
      It proves nothing by itself, but it is a reason to test the weights on the data.
    * A **shift**: if three in four of 128 finite values are outliers, these are the new baseline. If the
      values come down again later, they are judged by the old one: hard data may have harmed the weights.

    *After a restore*, the first values are those of weights known to be good. If more than a quarter of them
    are outliers nevertheless, the data are the cause, and these values are hard data.

    While the learning rate rises, former losses are a poor measure. In a *first* warm-up a spike takes a loss
    that stays bad (see ``first_warmup``). If the rate rises *again* to a former one, the baseline is
    forgotten, and only a value several times above it that is no better than half of the level at the start
    of the run is an outlier.

    Args:
        k: an outlier's distance from the median, in robust standard deviations.
        floor: its least distance from the median, as a share of the median.
        patience: consecutive outliers that make a spike.
        watched: the number's name, for the reports.

    Example:
        >>> detector = SpikeDetector(patience=2)
        >>> events = [detector.observe(step, 2.0 + step % 3 / 100) for step in range(100)]
        >>> any(events), detector.observe(100, 9.0), detector.observe(101, 9.0).onset
        (False, None, 100)
    """

    def __init__(self, k: float = 6.0, floor: float = 0.05, patience: int = 5, watched: str = "loss") -> None:
        self.k, self.floor, self.patience, self.watched = k, floor, patience, watched
        self._clean = Baseline(k, floor)
        self._hard = HardData(k, floor)
        self._shift, self._rise = ShiftTest(), RiseTest(k, floor)
        self._streak: _Streak | None = None
        self._after: _AfterRestore | None = None
        self._before_shift: _BeforeShift | None = None
        self._warmup = Warmup.NONE  # at the last value
        self._before: tuple[float, float] | None = None  # baseline and threshold before the rate rose
        self._start: list[float] = []  # the first values of the run, and
        self._level = 0.0  # how large they are

    @property
    def onset(self) -> int | None:
        """Step of the first outlier of the current streak; ``None`` if there is none."""
        return self._streak.onset if self._streak else None

    @property
    def is_within_baseline(self) -> bool:
        """Whether nothing speaks against the weights: there is no streak, or only hard data in it."""
        return self._streak is None or (self._streak.beyond == 0 and self._after is None)

    @property
    def baseline(self) -> float:
        """Median of the last clean values; NaN before there is one."""
        return self._clean.median

    @property
    def threshold(self) -> float:
        """What a value must exceed to be an outlier; NaN before 64 clean values, or if all are 0."""
        return self._clean.limit(self._level) if len(self._clean) >= ACTIVE_FROM else math.nan

    def observe(
        self,
        step: int,
        value: float,
        warmup: Warmup = Warmup.NONE,
        skipped: bool = False,
        broken: bool = False,
    ) -> SpikeEvent | None:
        """Reads the value of one optimizer step.

        Args:
            step: the optimizer step; it must grow from call to call.
            value: the step's loss, or gradient norm.
            warmup: whether the learning rate rises, and to which rates.
            skipped: whether the step was skipped because its scaled fp16 gradients overflowed. That is how
                loss scaling works, not a spike.
            broken: whether weights, gradients or optimizer state are known not to be finite.

        Returns:
            The event to report; usually ``None``.
        """
        finite = math.isfinite(value)
        if skipped and finite:
            return None
        if warmup is not self._warmup:
            self._note_warmup(warmup)
        outlier = not finite or self._is_outlier(value)
        if finite and len(self._start) < ACTIVE_FROM:
            self._start.append(value)
            self._level = middle(sorted(map(abs, self._start)))
        if outlier or self._shift.entries:
            self._shift.note(step, value, self._limit)
        rise = self._note_rise(step, value) if finite and warmup is Warmup.NONE else None
        if not outlier:
            self._end_streak()
            if self._after:
                self._note_restored(value)
            self._clean.admit(value)
            if self._before_shift:
                self._note_return(value)
            return rise
        streak = self._note_outlier(step, value)
        if outliers := self._shift.outliers(self._limit):
            return self._accept_shift(step, [value for _, value in outliers])
        if not streak.reported and ((broken and not skipped) or self._is_spike(streak, finite)):
            streak.reported = True
            return self._event("spike", step, streak.onset, list(streak.outliers))
        return rise

    def acquit(self) -> bool:
        """Answers a spike: the weights are sound. It is reported again after 1, 2, 4, … further outliers.

        Returns:
            Whether it is the first answer to this streak.
        """
        streak = self._streak
        if streak is None:
            return False
        self._acquit(streak.outliers)
        streak.ask_at = streak.length + 2**streak.answers
        streak.answers += 1
        return streak.answers == 1

    def restored(self, unmoved: int) -> None:
        """Answers an event: the weights are now a merge of clean snapshots.

        Args:
            unmoved: how many upcoming values still reflect the restored weights.
        """
        if self._before_shift:
            self._clean = Baseline(self.k, self.floor, self._before_shift.clean)
        self._streak = self._before_shift = None
        self._shift, self._rise = ShiftTest(), RiseTest(self.k, self.floor)
        self._after = _AfterRestore(min(unmoved, self.patience))

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON types (NaN and infinities as Python's ``json`` writes them)."""
        return {
            "clean": list(self._clean.values),
            "hard": list(self._hard.baseline.values),
            "healed": self._hard.longest,
            "trouble": [list(entry) for entry in self._shift.entries],
            "rise": [[list(entry) for entry in self._rise.recent], self._rise.pause, self._rise.asked],
            "streak": asdict(self._streak) if self._streak else None,
            "after": asdict(self._after) if self._after else None,
            "warmup": self._warmup.value,
            "before": list(self._before) if self._before else None,
            "before_shift": asdict(self._before_shift) if self._before_shift else None,
            "start": list(self._start),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a ``state_dict`` exactly."""
        state = copy.deepcopy(dict(state))
        self._clean = Baseline(self.k, self.floor, state["clean"])
        self._hard = HardData(self.k, self.floor, state["hard"], state["healed"])
        self._warmup = Warmup(state.get("warmup", "none"))  # older versions did not tell the two kinds apart
        self._start = state["start"]
        self._shift, self._rise = ShiftTest(state["trouble"]), RiseTest(self.k, self.floor, *state["rise"])
        self._streak = _Streak(**state["streak"]) if state["streak"] else None
        self._after = _AfterRestore(**state["after"]) if state["after"] else None
        self._before = tuple(state["before"]) if state["before"] else None
        self._before_shift = _BeforeShift(**state["before_shift"]) if state["before_shift"] else None
        self._level = middle(sorted(map(abs, self._start))) if self._start else 0.0

    def _note_warmup(self, warmup: Warmup) -> None:
        """Keeps the baseline from before a rise until its end; starts a new one when the rate rises again."""
        known = warmup is not Warmup.NONE and len(self._clean) >= ACTIVE_FROM
        self._before = (self.baseline, self.threshold) if known else None
        if warmup is Warmup.AGAIN:
            self._clean, self._shift = Baseline(self.k, self.floor), ShiftTest()
            self._before_shift = None
        self._rise = RiseTest(self.k, self.floor)
        self._warmup = warmup

    def _is_outlier(self, value: float) -> bool:
        if self._warmup is Warmup.AGAIN:
            return value > self._far_off
        # The threshold needs a sort, which most values can do without.
        known = len(self._clean) >= ACTIVE_FROM
        least = -math.inf if self._before else self._clean.least_limit(self._level)
        return known and value > least and value > self._limit

    @property
    def _limit(self) -> float:
        """What a value must exceed to be an outlier, unless the rate rises again."""
        if self._warmup is Warmup.FIRST:
            return first_warmup.limit(*(self._before or (self.baseline, self.threshold)), self._start)
        return self.threshold

    @property
    def _far_off(self) -> float:
        """What a value must exceed to be an outlier while the rate rises again."""
        if self._before is None or not math.isfinite(self._before[1]):
            return math.inf
        baseline, threshold = self._before
        far = baseline + max(_FAR * (threshold - baseline), _TIMES * abs(baseline))
        return max(far, _AS_AT_FIRST * self._level)

    def _note_rise(self, step: int, value: float) -> SpikeEvent | None:
        found = self._rise.onset(step, value, self._clean, self._level)
        if found is None:
            return None
        streak = self._streak
        if (streak and (streak.reported or streak.answers)) or self._after:
            return None
        onset, baseline, limit = found
        values = [value for _, value in self._rise.recent]
        if self._is_hard(middle(sorted(values))):
            return None
        return SpikeEvent("rise", self.watched, onset, step, values, baseline, (baseline + limit) / 2)

    def _note_outlier(self, step: int, value: float) -> _Streak:
        """Adds an outlier to the streak, or starts one with it."""
        if self._streak is None:
            # A long streak that healed by itself was hard data, so a similar one is reported only later.
            longest = self._hard.longest
            ask_at = 2 * longest + self.patience if longest else None
            self._streak = _Streak(step, ask_at=ask_at)
        streak = self._streak
        streak.outliers = [*streak.outliers[1 - HISTORY :], value]
        streak.length += 1
        if self._is_hard(value):
            streak.beyond = 0
            self._hard.baseline.admit(value)
        else:
            streak.beyond += 1
        if self._after:
            self._note_restored(value)
        return streak

    def _is_hard(self, value: float) -> bool:
        """Whether a value lies in the range of the known hard data."""
        low, high = self._hard.range(self._clean, self._level)
        return low <= value <= high

    def _is_spike(self, streak: _Streak, finite: bool) -> bool:
        if self._after and self._after.values:
            return False  # it is not known yet whether the data changed
        if finite and self._warmup is Warmup.FIRST and not streak.answers:
            lasting = self._shift.outliers(self._limit, first_warmup.LASTING) if streak.beyond else []
            if lasting:
                streak.onset = min(streak.onset, lasting[0][0])
            return bool(lasting)
        is_due = streak.ask_at is not None and streak.length >= streak.ask_at
        return is_due or streak.beyond >= self.patience

    def _note_restored(self, value: float) -> None:
        """Notes one of the first values after a restore; the last one decides whether the data changed."""
        after = self._after
        assert after is not None
        if not math.isfinite(value):
            return
        after.values.append(value)
        if len(after.values) < after.unmoved:
            return
        self._after = None
        threshold = self.threshold
        if sorted(after.values)[after.unmoved // 4] > threshold:
            self._acquit([value for value in after.values if value > threshold])
        elif self._streak:
            self._streak.beyond = self._streak.length

    def _acquit(self, values: list[float]) -> None:
        self._hard.note(values, self._clean, self._level)
        if self._streak:
            self._streak.reported, self._streak.beyond = False, 0

    def _end_streak(self) -> None:
        """Ends a streak; if it was reported before it ended by itself, it was hard data."""
        streak, self._streak = self._streak, None
        if streak is None:
            return
        if streak.reported or streak.answers:
            self._hard.note(streak.outliers, self._clean, self._level)
        elif streak.beyond or not self._hard.longest:
            return
        self._hard.longest = max(self._hard.longest, streak.length)

    def _accept_shift(self, step: int, outliers: list[float]) -> SpikeEvent:
        """Makes the outliers the new baseline."""
        event = self._event("shift", step, self._shift.entries[0][0], outliers)
        self._before_shift = _BeforeShift(event.onset, list(self._clean.values), self._clean.median)
        self._clean = Baseline(self.k, self.floor, outliers)
        self._shift, self._streak, self._after = ShiftTest(), None, None
        if self._warmup is Warmup.FIRST:
            self._before = None
        self._rise = RiseTest(self.k, self.floor)
        return event

    def _note_return(self, value: float) -> None:
        """Tests whether the data are back to what they were before a shift, and then restores that baseline.

        Values that are still high then are no longer hard data: those have harmed the weights, and the streak
        began with them.
        """
        before = self._before_shift
        assert before is not None
        before.low = before.low + 1 if value < (self.baseline + before.median) / 2 else 0
        if before.low == _RETURNED:
            self._clean, self._before_shift = Baseline(self.k, self.floor, before.clean), None
            self._rise = RiseTest(self.k, self.floor)
            self._streak = _Streak(before.onset)

    def _event(
        self, kind: Literal["spike", "shift"], step: int, onset: int, values: list[float]
    ) -> SpikeEvent:
        baseline, threshold = self._before or (self.baseline, self.threshold)
        return SpikeEvent(kind, self.watched, onset, step, values, baseline, threshold)
