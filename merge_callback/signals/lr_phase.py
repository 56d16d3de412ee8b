"""Infers the learning-rate phase (warmup, stable or decay) from the rates that were really applied."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from operator import mul
from typing import Any

_EQUAL = 1e-10  # relative: below the first drop of a cosine over 100k steps (2.5e-10), above float64 noise
_FLOOR = 1e-5  # of the peak: lower rates count as equal to it, so rounding noise around zero is no change
_SPENT = 5e-4  # of the peak: a constant rate below it is the tail of a decay, not a phase of its own
_FIRST_RISE = math.log(1.1)  # a smaller rise from the first level of the run is ripple
_STEP = math.log(0.55)  # a deeper drop may be a step decay, as x0.5 is; five stairs of 1-sqrt start with less
_NEAR_TOP = math.log(0.8)  # a step decay starts above this share of the segment's highest rate
_STAIRS = 3  # a plateau is held this many times longer than the stairs next to it
_SPACING = 1.05  # growth of the elapsed time between two measurements of the slope


class Phase(str, Enum):
    """What the learning rate is doing; compares equal to its name."""

    WARMUP = "warmup"
    STABLE = "stable"
    DECAY = "decay"

    @property
    def code(self) -> int:
        """0, 1 or 2, for loggers that draw only numbers."""
        return list(Phase).index(self)


class Warmup(Enum):
    """Whether the learning rate is rising, or just rose: then former losses are a poor measure of the loss.

    Whether a first rise is a warm-up or a mistake can't be read from the rates: a warm-up that is stepped per
    epoch may hold a rate for thousands of steps, and then multiply it by 200.
    """

    NONE = "none"
    FIRST = "first"
    """To rates that the run has not trained at since its start."""
    AGAIN = "again"
    """Back to a rate that it has trained at."""


@dataclass
class _Trace:
    """The detector's state. Levels are natural logs of the rate; times count observed steps."""

    steps: int = 0
    phase: Phase = Phase.STABLE
    since: int = 0
    rate: float = 0.0  # newest rate, not its log
    peak: float = 0.0  # highest rate of the run, not its log
    settled: float = 0.0  # highest rate outside warmups, once there was one; not its log
    begun: bool = False  # whether a rate was observed
    level: float = 0.0  # level of the current hold, which is a run of equal rates
    level_since: int = 0
    change: float = 0.0  # the change by which the level was reached
    holds: list[int] = field(default_factory=list)  # lengths of the last three holds left in one direction
    high: float = 0.0  # highest level of the segment
    high_since: int = 0
    low: float = 0.0  # lowest level of the segment
    low_end: int = 0  # first step above it
    mark: float = 0.0  # level at the last measurement of the slope
    mark_at: int = 0


class LRPhaseDetector:
    """Says after every optimizer step whether the learning rate is warming up, stable or decaying.

    It reads one number per step, the learning rates summed over all parameters, and only ratios of it, so
    scales do not matter. It never looks ahead. Its *patience* is 0.5 % of the run.

    * **Constant** is stable from the first step on.
    * **Warmup** begins when the rate has risen by 10 % from its initial level or, later on, by 80 % above the
      segment's lowest. It ends at the top, which is known once no new high came for one patience (on top of
      a staircase, as of a schedule stepped per epoch: for one and a half stairs). A warm restart appears
      as a warmup of one patience, then a new stable segment since the restart.
    * **A fall after a plateau** is decay from its first drop on, which is known after three drops in a
      row. A plateau is held for the patience and three times as long as the stairs that follow it.
    * **A fall without a plateau** (cosine, linear, inverse square root, exponential) is pseudo-stable while
      the rate falls slower than 1/t, t counted from the segment's start, and decay once it falls faster.
      The sum of the rates diverges only if they fall no faster than 1/t (Robbins & Monro, 1951): until then
      the run can still travel any distance, afterwards it only settles. A cosine turns at 63 % of its
      peak, a straight line at half, an exponential at 1/e, an inverse square root never.
    * **A new stable segment** begins when a fall ends in a plateau: after a decay, or at 55 % or less of
      the segment's highest rate. A single drop of that depth, from near that rate, is a step decay and needs
      only the patience. Shallower falls stay in their segment. A rate held below 1/2000 of the peak is
      decay.

    A segment is one pair (`phase`, `since`); only snapshots of the same segment belong in a merge. `since`
    usually lies in the past: it names the step at which the change began, which is known only later.

    Limits: an inverse square root after a long constant stretch is called decay. A schedule stepped once per
    epoch cannot be read before the next epoch, and a decay of fewer than five stairs may pass for step
    decays. Groups with different shapes count by their share of the sum.

    Args:
        total_steps: Optimizer steps of the run, for the patience. `None`, or a value that is not finite and
            positive, means unknown: the patience is 100 steps then.

    Example:
        >>> detector = LRPhaseDetector(total_steps=1000)
        >>> phases = [detector.observe([lr]) for lr in [0.0, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2]]
        >>> phases[-1].value, detector.since, detector.lr_ratio
        ('stable', 2, 1.0)
    """

    def __init__(self, total_steps: float | None = None) -> None:
        self._patience, self._longest_stair = 100, 5000.0
        if total_steps is not None and 0 < total_steps < math.inf:
            # At least three: a peak shared by two chained schedulers lasts two steps and is no plateau.
            self._patience, self._longest_stair = max(3, int(total_steps) // 200), total_steps / 4
        self._trace = _Trace()

    @property
    def phase(self) -> Phase:
        """The phase of the newest step."""
        return self._trace.phase

    @property
    def since(self) -> int:
        """Number of observed steps before the first step of the current segment."""
        return self._trace.since

    @property
    def segment(self) -> tuple[Phase, int]:
        """Phase and ``since`` together: they name the current segment."""
        return self._trace.phase, self._trace.since

    @property
    def steps(self) -> int:
        """Number of observed steps."""
        return self._trace.steps

    @property
    def lr_ratio(self) -> float:
        """The newest rate over the highest of the run, 0 to 1."""
        return self._trace.rate / self._trace.peak if self._trace.peak > 0 else 0.0

    @property
    def warmup(self) -> Warmup:
        """Whether the rate is rising, or just rose, for the first time or back to a former level.

        It is neither if the rate rises by a tenth above any that it has had since the first warmup, since it
        first fell, or since a quarter of the run went by at one rate, nor if it fell back again: the effect
        on the loss is not a warmup's then.
        """
        trace = self._trace
        if trace.phase is not Phase.WARMUP or trace.level < trace.high:
            return Warmup.NONE
        if trace.settled == 0:
            return Warmup.FIRST
        return Warmup.AGAIN if trace.rate <= 1.1 * trace.settled else Warmup.NONE

    def observe(self, lrs: Sequence[float], weights: Sequence[float] | None = None) -> Phase:
        """Read the learning rates of one optimizer step; call it once per step.

        Args:
            lrs: Learning rate of each parameter group. A step with a NaN or infinity is counted, not read.
            weights: Number of parameters of each group, equal on every rank. `None`: one each.

        Returns:
            The phase, as far as it is known by now.
        """
        trace = self._trace
        now, rate = trace.steps, sum(lrs if weights is None else map(mul, lrs, weights))
        trace.steps += 1
        if math.isfinite(rate):
            trace.rate = rate
            if rate > trace.peak:  # comparisons, as max() takes three times as long, at every step
                trace.peak = rate
            floor = _FLOOR * trace.peak or 1e-30
            self._read(now, math.log(rate if rate > floor else floor))
            if trace.settled < trace.peak and trace.phase is not Phase.WARMUP:
                self._settle(now)
        return trace.phase

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON types, without the patience: a resumed run may be longer."""
        return {**asdict(self._trace), "phase": self._trace.phase.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a `state_dict()` exactly."""
        self._trace = _Trace(**{**state, "phase": Phase(state["phase"])})

    def _read(self, now: int, level: float) -> None:
        """Distinguishes a hold, a rise and a fall, and checks whether a plateau was held long enough."""
        trace = self._trace
        if not trace.begun:
            trace.begun, trace.level, trace.level_since = True, level, now
            # A rate of zero trains nothing, so it can only be the start of a warmup.
            self._begin(Phase.STABLE if trace.peak > 0 else Phase.WARMUP, now, level)
        elif level > trace.level + _EQUAL:
            self._rise(now, level)
        elif level < trace.level - _EQUAL:
            self._fall(now, level)
        elif self._is_plateau(now, level):
            spent = self.lr_ratio < _SPENT
            self._begin(Phase.DECAY if spent else Phase.STABLE, trace.level_since, level)
        if trace.phase is Phase.WARMUP and self._warmed_up(now):
            self._begin(Phase.STABLE, trace.high_since, trace.high)

    def _rise(self, now: int, level: float) -> None:
        trace = self._trace
        if trace.level == trace.low:
            trace.low_end = 0 if trace.level_since == 0 and self._is_stair(now) else now
        self._move(now, level)
        # A run that begins by rising is warming up; later a rise counts if it could undo a step decay.
        ripple = _FIRST_RISE if trace.low_end == 0 else -_STEP
        if trace.phase is not Phase.WARMUP and level >= trace.low + ripple:
            self._begin(Phase.WARMUP, trace.low_end, level)
            trace.high_since = now
        elif level > trace.high:
            trace.high, trace.high_since = level, now

    def _fall(self, now: int, level: float) -> None:
        trace = self._trace
        self._move(now, level)
        if trace.phase is not Phase.DECAY and self._left_plateau():
            self._begin(Phase.DECAY, now - sum(trace.holds[1:]), level)
        elif trace.phase is Phase.STABLE and level < trace.low and self._outruns(now, level):
            self._begin(Phase.DECAY, trace.mark_at, level)
        trace.low = min(trace.low, level)

    def _move(self, now: int, level: float) -> None:
        """End the current hold and start the next one at the given level."""
        trace = self._trace
        change = level - trace.level
        if change * trace.change < 0:
            trace.holds = []
        trace.holds = [*trace.holds[-2:], now - trace.level_since]
        trace.level, trace.level_since, trace.change = level, now, change

    def _settle(self, now: int) -> None:
        """Notes the rate, except in the first segment while that may be the first stair of a warmup."""
        trace = self._trace
        if trace.since > 0:
            trace.settled = max(trace.settled, trace.rate)
        elif trace.change < 0 or not self._is_stair(now - trace.level_since):
            trace.settled = trace.peak

    def _begin(self, phase: Phase, since: int, high: float) -> None:
        """Open a segment whose highest level so far is the given one."""
        trace = self._trace
        trace.phase, trace.since, trace.mark_at = phase, since, since
        trace.high, trace.high_since = high, since
        trace.low, trace.low_end = trace.level, since
        if phase is Phase.STABLE:
            trace.holds = []

    def _is_stair(self, held: int) -> bool:
        """Whether a hold is short enough for a stair of a warmup: a quarter of the run."""
        return held <= self._longest_stair

    def _warmed_up(self, now: int) -> bool:
        """Whether no new high came for the patience, or on top of a staircase for 1.5 of its stairs."""
        trace = self._trace
        stair = trace.holds[-1] if trace.holds and trace.level_since == trace.high_since else 0
        wait = max(self._patience, 1.5 * stair if self._is_stair(stair) else 0)
        return trace.peak > 0 and now - trace.high_since + 1 >= wait

    def _left_plateau(self) -> bool:
        """Whether the last three changes were drops, the first of them from a plateau."""
        holds = self._trace.holds
        falling = self._trace.change < 0 and len(holds) == 3
        return falling and holds[0] >= max(self._patience, _STAIRS * max(holds[1:]))

    def _outruns(self, now: int, level: float) -> bool:
        """Whether the rate fell faster than 1/t since it was last measured (drop to drop on a staircase)."""
        trace = self._trace
        if self._stepped():  # How long this level is held decides.
            return False
        elapsed, before = now - trace.since, trace.mark_at - trace.since
        if elapsed < _SPACING * before:
            return False
        if before and level - trace.mark < -math.log(elapsed / before):
            return True
        trace.mark, trace.mark_at = level, now
        return False

    def _is_plateau(self, now: int, level: float) -> bool:
        """Whether the current hold is a plateau that ends a fall."""
        trace = self._trace
        held = now - trace.level_since + 1
        if held < self._patience or trace.phase is Phase.WARMUP or not trace.holds:
            return False
        plateau = held >= _STAIRS * trace.holds[-1]
        if trace.phase is Phase.DECAY:
            return plateau and self.lr_ratio >= _SPENT
        return level <= trace.high + _STEP and (plateau or self._stepped())

    def _stepped(self) -> bool:
        """Whether the last change alone was a deep drop, not the steep part of a longer fall."""
        trace = self._trace
        return trace.change <= _STEP and trace.level - trace.change >= trace.high + _NEAR_TOP
