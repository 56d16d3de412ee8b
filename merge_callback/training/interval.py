"""When a snapshot is due."""

from __future__ import annotations

from merge_callback.training.step_statistics import StepStatistics
from merge_callback.training.token_clock import TokenClock, crossed


class Interval:
    """Says after which optimizer steps a snapshot is due, on all ranks alike.

    In tokens, the steps are those of one process that sees all ranks' batches: where a step may have crossed
    a multiple of the interval, its tokens are waited for. A step of more than twice the tokens of any before
    it may be noticed one step late.

    Args:
        every: optimizer steps, or tokens.
        unit: ``"steps"`` or ``"tokens"``.
        clock: of the run.
        statistics: that tell the clock.
        step: optimizer steps taken so far.

    Attributes:
        mark: how far the run had come after the last step, in ``unit``.
    """

    def __init__(
        self, every: int, unit: str, clock: TokenClock, statistics: StepStatistics, step: int
    ) -> None:
        self.every, self.unit, self.clock, self.statistics = every, unit, clock, statistics
        self.mark = self._progress(step)

    def is_over(self, step: int) -> bool:
        """Whether it has passed with ``step``; the clock is exact then.

        To be called once after each step, when the statistics have ended it.
        """
        if self.unit == "tokens" and self.clock.is_near(self.every):
            self.statistics.settle()
        before, self.mark = self.mark, self._progress(step)
        is_over = crossed(before, self.mark, self.every)
        if is_over:
            self.statistics.settle()
        return is_over

    def _progress(self, step: int) -> int:
        return self.clock.tokens if self.unit == "tokens" else step
