"""When a snapshot is due."""

from __future__ import annotations

from merge_callback.signals.step_statistics import StepStatistics
from merge_callback.signals.token_clock import TokenClock, crossed


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
        self.mark = clock.tokens if unit == "tokens" else step

    def is_over(self, step: int) -> bool:
        """Whether it has passed with ``step``; the clock is exact then.

        To be called once after each step, when the statistics have ended it.
        """
        in_tokens = self.unit == "tokens"
        if in_tokens and self.clock.is_near(self.every):
            self.statistics.flush_to_clock()
        before, self.mark = self.mark, self.clock.tokens if in_tokens else step
        if not crossed(before, self.mark, self.every):
            return False
        self.statistics.flush_to_clock()
        return True
