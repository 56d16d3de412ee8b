"""How far a run is: its optimizer steps, tokens and learning rates, and what they tell of the plan."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from merge_callback.engine.model_parts import global_numel, own_gradient
from merge_callback.engine.plan import Plan
from merge_callback.messages import tell, warn
from merge_callback.options import Options
from merge_callback.sharding import Ranks, Sharding
from merge_callback.signals.applied_lr import AppliedLR
from merge_callback.signals.host import Host
from merge_callback.signals.lr_phase import LRPhaseDetector
from merge_callback.signals.snapshot_interval import Interval
from merge_callback.signals.step_statistics import Statistics, StepStatistics
from merge_callback.signals.token_clock import TokenClock
from merge_callback.snapshots.snapshot import Snapshot

log = logging.getLogger(__name__)

UNSEEN = 256
"""Batches of a manual optimization without a step, after which the user is warned."""

_MEASURED_OVER = 3  # optimizer steps after which the tokens per step are reported
_COUNTED_OVER = 8  # batches after which the steps per batch of a manual optimization are reported


class Progress:
    """Counts a run's steps and tokens, and reads its learning rates, batch by batch.

    Args:
        options: the options of merging.
        host: the run.
        ranks: its processes.
        names: the model's names of its tensors, by ``id``.
        sharding: how the ranks share the model.

    Attributes:
        step: the last optimizer step seen.
        stepless: batches of a manual optimization since then.
        clock: the tokens.
        statistics: the loss, the gradients and the tokens of each step.
        applied: the learning rates that were applied.
        phases: their phase.
        interval: from one snapshot to the next.
    """

    def __init__(
        self, options: Options, host: Host, ranks: Ranks, names: Mapping[int, str], sharding: Sharding
    ) -> None:
        self._options, self._host, self._ranks = options, host, ranks
        self.clock = TokenClock(options.count_tokens)
        self.statistics = StepStatistics(
            ranks, host.counts_batches, host.device, self.clock, partial(own_gradient, names, sharding)
        )
        self.applied = AppliedLR(host.optimizers, partial(global_numel, names, sharding))
        self.phases = LRPhaseDetector(host.total_batches)
        self.step, self.stepless = host.step, 0
        self.interval = Interval(options.every, options.unit, self.clock, self.statistics, self.step)

    def begin(self, plan: Plan) -> None:
        """Begins, once the state is loaded, to measure what is not known of the plan yet."""
        self._plan = plan
        self._segment = self.phases.segment
        self._first = (self.step, self.clock.tokens)
        self._is_measured, self._batches = False, 0

    @property
    def tokens(self) -> int | None:
        """Tokens seen so far; ``None`` if they can't be counted."""
        return self.clock.tokens if self.clock.countable else None

    @property
    def phase_since(self) -> int:
        """The step at which the present segment began."""
        # Several optimizers step in turn.
        return self.phases.since * self.step // max(1, self.phases.steps)

    def begin_batch(self, batch: Any, tokens: int | Tensor | None) -> None:
        """With the first batch that is shown, finds out whether tokens can be counted.

        Raises:
            ValueError: if they can't, and the interval is in tokens.
            RemoteError: if another rank raises.
        """
        if batch is not None or tokens is not None:
            error = _failure(self.clock.count, batch) if tokens is None else None
            needs_none = self._options.unit == "steps" or self._options.experts is not None
            bearable = isinstance(error, ValueError) and needs_none
            self._ranks.agree(None if bearable else error)
            self.clock.countable = all(self._ranks.exchange(error is None))

    def count(self, batch: Any, tokens: int | Tensor | None) -> None:
        """Counts the tokens of a batch."""
        try:
            found = self.clock.count(batch) if tokens is None else tokens
            self.statistics.add_tokens(found if isinstance(found, Tensor) else int(found))
        except ValueError as error:
            self.statistics.add_tokens(0 if self._options.unit == "tokens" else math.nan)
            say = warn if self._ranks.is_first else log.warning
            say(f"merge: the tokens of the batch before step {self.step} are not counted: {error}")

    def end_batch(self) -> bool:
        """Ends a batch; returns whether an optimizer step was taken with it."""
        step = self._host.step
        self._batches += 1
        if self._plan.batches and self._batches == _COUNTED_OVER and step > self._first[0]:
            self._report_steps_per_batch((step - self._first[0]) / _COUNTED_OVER)
        if step == self.step:
            self._note_no_step()  # gradients are being accumulated
            return False
        self.step, self.stepless = step, 0
        return True

    def enters_segment(self) -> bool:
        """Reads the learning rates of a step; returns whether another segment has begun."""
        self.phases.observe([self.applied.total])
        before, self._segment = self._segment, self.phases.segment
        return before != self._segment

    def end_step(self, loss_scale: Tensor | None) -> tuple[Statistics | None, bool]:
        """Ends a step; returns the statistics of the step before, and whether a snapshot is due."""
        seen = self.statistics.end_step(self.step, loss_scale)
        if not self._is_measured and self.step - self._first[0] >= _MEASURED_OVER:
            self._is_measured = True
            self._report_tokens_per_step()
        return seen, self.interval.is_over(self.step)

    def snapshot(self, lr_factor: float) -> Snapshot:
        """A snapshot of this step, still without weights.

        Args:
            lr_factor: by which the learning rates were multiplied after a restore.
        """
        return Snapshot(
            step=self.step,
            tokens=self.tokens,
            lr=max(self.applied.rates, default=0.0) * lr_factor,
            lr_ratio=self.phases.lr_ratio,
            phase=self.phases.phase.value,
            since=self.phases.since,
            lr_step=self.phases.steps,
        )

    def state_dict(self) -> dict[str, Any]:
        """All of it, as primitives."""
        statistics = self.statistics.state_dict()  # first, because it may advance the clock
        return {
            "tokens": self.clock.tokens,
            "step": self.step,
            "mark": self.interval.mark,
            "largest_step": self.clock.largest,
            "statistics": statistics,
            "learning_rates": self.applied.state_dict(),
            "phases": self.phases.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self.step, self.interval.mark = state["step"], state["mark"]
        self.clock.tokens, self.clock.largest = state["tokens"], state["largest_step"]
        self.statistics.load_state_dict(state["statistics"])
        self.applied.load_state_dict(state["learning_rates"])
        self.phases.load_state_dict(state["phases"])

    def _note_no_step(self) -> None:
        """Warns if a manual optimization bypasses Lightning's step counter."""
        self.stepless += self._host.is_manual
        if self.stepless == UNSEEN:
            warn(
                f"merge: no optimizer step was seen in {UNSEEN} batches, so no snapshot is taken: step the "
                "optimizers of self.optimizers(); Lightning does not count steps with use_pl_optimizer=False"
            )

    def _report_tokens_per_step(self) -> None:
        if self._options.unit == "tokens" and self.clock.countable:
            self.statistics.flush_to_clock()
            per_step = (self.clock.tokens - self._first[1]) / (self.step - self._first[0])
            tell(self._plan.measured(per_step), self._plan.warnings(per_step))

    def _report_steps_per_batch(self, per_batch: float) -> None:
        self._plan = self._plan.with_steps(per_batch)
        if self._options.unit == "steps":
            tell(self._plan.counted(per_batch), self._plan.warnings())


def _failure(function: Callable[[Any], Any], argument: Any) -> Exception | None:
    try:
        function(argument)
    except Exception as error:
        return error
    return None
