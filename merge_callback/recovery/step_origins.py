"""Traces an outlier to its batches, its samples and its rank."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

from merge_callback.signals.host import Host
from merge_callback.signals.step_statistics import StepStatistics
from merge_callback.snapshots.window_merger import WindowMerger

_REMEMBERED = 128  # steps


class StepOrigins:
    """Remembers which batches the last optimizer steps were taken with.

    Args:
        host: the run.
        statistics: the statistics of its steps, which hold each rank's own losses.
        merger: returns the merger of the run's window.
    """

    def __init__(self, host: Host, statistics: StepStatistics, merger: Callable[[], WindowMerger]) -> None:
        self._host, self._statistics, self._merger = host, statistics, merger
        self._steps: deque[tuple[int, int, int]] = deque(maxlen=_REMEMBERED)  # step, epoch, last batch_idx

    def end_step(self, step: int, batch_idx: int) -> None:
        """Notes the position in the data at which an optimizer step ends."""
        self._steps.append((step, self._host.epoch, batch_idx))

    def of(self, step: int, count: int, threshold: float) -> dict[str, Any]:
        """The origins of the last steps up to ``step``, at most ``count`` of them, for a record.

        All ranks have to call this.

        Returns:
            ``batches``: for each step its ``step``, ``epoch``, ``batch_idx`` (the last one if gradients are
            accumulated), ``sample_indices`` if the first rank's sampler has them, and ``rank_losses``, each
            rank's own. ``sick_rank``: the only rank of several whose losses lie above the threshold.
        """
        known = [entry for entry in self._steps if entry[0] <= step][-count:]
        own = self._statistics.own_losses([entry[0] for entry in known])
        by_rank = self._merger().ranks.exchange(own)
        batches: list[dict[str, Any]] = []
        for i, (at, epoch, batch_idx) in enumerate(known):
            batches.append({"step": at, "epoch": epoch, "batch_idx": batch_idx})
            if indices := self._host.sample_indices(epoch, batch_idx):
                batches[-1]["sample_indices"] = indices
            if len(by_rank) > 1:
                batches[-1]["rank_losses"] = [losses[i] for losses in by_rank]
        found: dict[str, Any] = {"batches": batches}
        off = [rank for rank, losses in enumerate(by_rank) if _all_above(losses, threshold)]
        if len(by_rank) > 2 and len(off) == 1:
            found["sick_rank"] = off[0]
        return found

    def state_dict(self) -> list[list[int]]:
        """The remembered steps, as primitives."""
        return [list(entry) for entry in self._steps]

    def load_state_dict(self, state: Any) -> None:
        """Goes on from a ``state_dict``."""
        self._steps.extend(tuple(entry) for entry in state)


def _all_above(losses: list[float | None], threshold: float) -> bool:
    known = [loss for loss in losses if loss is not None]
    return bool(known) and all(not math.isfinite(loss) or loss > threshold for loss in known)
