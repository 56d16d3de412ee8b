"""Decides when a snapshot is due."""

from __future__ import annotations

from merge_callback.signals.step_statistics import StepStatistics
from merge_callback.signals.token_clock import TokenClock


class Interval:
    """Says after which optimizer steps a snapshot is due, the same on all ranks.

    In tokens, the steps are the same as those of one process that sees all ranks' batches: if a step may have
    crossed a multiple of the interval, its tokens are waited for. A step with more than twice the tokens of
    any before it may be noticed one step late.

    Args:
        every: the interval, in optimizer steps or tokens.
        unit: ``"steps"`` or ``"tokens"``.
        clock: the run's clock.
        statistics: they advance the clock.
        step: optimizer steps taken so far.

    Attributes:
        mark: the run's position after the last step, in ``unit``.
    """

    def __init__(
        self, every: int, unit: str, clock: TokenClock, statistics: StepStatistics, step: int
    ) -> None:
        self.every, self.unit, self.clock, self.statistics = every, unit, clock, statistics
        self.mark = clock.tokens if unit == "tokens" else step

    def is_over(self, step: int) -> bool:
        """Whether the interval has passed with ``step``; if so, the clock is exact.

        Call it once after each step, when the statistics have ended the step.
        """
        before, every = self.mark, self.every
        if self.unit == "tokens":
            clock = self.clock
            # A step of up to twice the largest so far would cross a multiple.
            if clock.largest == 0 or clock.tokens % every + 2 * clock.largest >= every:
                self.statistics.flush_to_clock()
            self.mark = clock.tokens
        else:
            self.mark = step
        if self.mark // every == before // every:
            return False
        self.statistics.flush_to_clock()
        return True
