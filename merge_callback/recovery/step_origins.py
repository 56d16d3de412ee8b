"""Where an outlier came from: its batch, its samples, and the rank it was on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

from merge_callback.signals.step_statistics import StepStatistics
from merge_callback.snapshots.merge import WindowMerger

_REMEMBERED = 128  # steps

_WALKED = 1_000_000  # samples of a rank; to walk through more would hold training up


class StepOrigins:
    """Remembers which batches the last optimizer steps were taken with.

    Args:
        trainer: in fit.
        statistics: of its steps: they know each rank's own losses.
        merger: gives that of the run's window.
    """

    def __init__(
        self, trainer: Trainer, statistics: StepStatistics, merger: Callable[[], WindowMerger]
    ) -> None:
        self._trainer, self._statistics, self._merger = trainer, statistics, merger
        self._epochs: Any = trainer.fit_loop.epoch_progress.current
        self._steps: deque[tuple[int, int, int]] = deque(maxlen=_REMEMBERED)  # step, epoch, last batch_idx

    def end_step(self, step: int, batch_idx: int) -> None:
        """Notes where in the data an optimizer step ends."""
        self._steps.append((step, self._epochs.processed, batch_idx))

    def of(self, step: int, count: int, threshold: float) -> dict[str, Any]:
        """The origins of ``step`` and of up to ``count`` steps in all that end with it, for a record.

        All ranks have to call this.

        Returns:
            ``batches``: of each step its ``step``, ``epoch``, ``batch_idx`` (the last one where gradients are
            accumulated), ``sample_indices`` where the first rank's sampler tells, and ``rank_losses``, each
            rank's own. ``sick_rank``: the only rank of several whose losses lie above the threshold.
        """
        known = [entry for entry in self._steps if entry[0] <= step][-count:]
        own = self._statistics.own_losses([entry[0] for entry in known])
        by_rank = self._merger().ranks.exchange(own)
        batches: list[dict[str, Any]] = []
        for i, (at, epoch, batch_idx) in enumerate(known):
            batches.append({"step": at, "epoch": epoch, "batch_idx": batch_idx})
            if indices := sample_indices(self._trainer, epoch, batch_idx):
                batches[-1]["sample_indices"] = indices
            if len(by_rank) > 1:
                batches[-1]["rank_losses"] = [losses[i] for losses in by_rank]
        found: dict[str, Any] = {"batches": batches}
        off = [rank for rank, losses in enumerate(by_rank) if _all_above(losses, threshold)]
        if len(by_rank) > 2 and len(off) == 1:
            found["sick_rank"] = off[0]
        return found

    def state_dict(self) -> list[list[int]]:
        """What is remembered, as primitives."""
        return [list(entry) for entry in self._steps]

    def load_state_dict(self, state: Any) -> None:
        """Goes on from a ``state_dict``."""
        self._steps.extend(tuple(entry) for entry in state)


def sample_indices(trainer: Trainer, epoch: int, batch_idx: int) -> list[int] | None:
    """The data set's indices of a batch on this rank, where the sampler gives the same ones each time.

    That is a sequential one, or a distributed one (which shuffles by seed and epoch), in batches of one size.
    """
    loaders = trainer.fit_loop._combined_loader
    loader = loaders.flattened[0] if loaders is not None and len(loaders.flattened) == 1 else None
    batches = getattr(loader, "batch_sampler", None)
    if type(batches) is not BatchSampler:
        return None
    sampler: Any = batches.sampler
    size = batches.batch_size
    first = batch_idx * size
    if type(sampler) is SequentialSampler:
        return list(range(first, min(first + size, len(sampler)))) or None
    # Of this very type: a wrapper of another sampler would draw from it again.
    if type(sampler) is DistributedSampler and sampler.epoch == epoch and len(sampler) <= _WALKED:
        return list(islice(iter(sampler), first, first + size))
    return None


def _all_above(losses: list[float | None], threshold: float) -> bool:
    known = [loss for loss in losses if loss is not None]
    return bool(known) and all(not math.isfinite(loss) or loss > threshold for loss in known)
