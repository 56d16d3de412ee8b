"""Decides whether the weights or the data are to blame, by trying a candidate on the batch of the alarm.

Before live weights are overwritten, the training loss of that batch is computed again, with the live weights
and with those before the spike. The live weights are to blame only if the latter do clearly better.
"""

from __future__ import annotations

import copy
import math
from collections import UserDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

from torch import Tensor

from merge_callback.recovery.deferred_signals import DeferredSignals
from merge_callback.sharding import Ranks
from merge_callback.signals.host import HeldBatch, LossOf, Rehearsal, UnrepeatableStepError
from merge_callback.snapshots.capture import ModelTensors

T = TypeVar("T")

_MOST_BYTES = 256 << 20  # of the batches held; fewer are held if they are larger
_MOST_BATCHES = 8  # micro-batches held: the newest

_WEIGHED = 16  # the size of every 16th batch is measured

_SHARE = 0.5  # of the excess over the baseline that a candidate must remove


@dataclass(frozen=True)
class Evidence:
    """The losses of the same batches with the live weights, and with those before the spike.

    Args:
        source: ``"batch"``, the batches of the step that raised the alarm; ``"validation"``, the first
            batches of the validation; or ``"weights"``: they are not finite, and nothing was tried.
        live: loss of the live weights, over all ranks.
        candidate: loss of the weights that would replace them; NaN if the live ones turned out sound.
        snapshot: loss of the newest snapshot among those that the candidate is a merge of; NaN if the
            candidate turned out no better.
        validation: losses of the live weights and of the candidate on the first batches of the validation;
            ``None`` if they were not computed.
        guilty: whether the live weights are to blame.
    """

    source: str
    live: float
    candidate: float = math.nan
    snapshot: float = math.nan
    validation: tuple[float, float] | None = None
    guilty: bool = False

    def record(self) -> dict[str, Any]:
        """As primitives."""
        return {key: value for key, value in vars(self).items() if key != "guilty"}


def is_clearly_better(candidate: float, live: float, alarm: Alarm) -> bool:
    """Whether a candidate's loss speaks against the live weights, rather than the data against both.

    It does if the live loss lies above the threshold and the candidate removes half of the excess over the
    baseline, or if the candidate's loss is finite and the live one is not.

    >>> alarm = Alarm.of(baseline=2.0, threshold=2.2, value=9.0)
    >>> is_clearly_better(candidate=2.1, live=9.0, alarm=alarm)
    True
    >>> is_clearly_better(candidate=8.8, live=9.0, alarm=alarm)  # hard data
    False
    """
    if not math.isfinite(candidate) or not math.isfinite(live):
        return math.isfinite(candidate)
    return live > alarm.threshold and live - candidate >= _SHARE * (live - alarm.baseline)


@dataclass(frozen=True)
class Alarm:
    """What a loss is compared with: baseline and threshold, and how far off the outlier was."""

    baseline: float
    threshold: float
    excess: float
    """The share of the outlier that lay above its baseline; 1 if it is not finite."""

    @classmethod
    def of(cls, baseline: float, threshold: float, value: float) -> Alarm:
        """The alarm that an outlier raises."""
        share = (value - baseline) / abs(value) if value else 1.0
        return cls(baseline, threshold, min(1.0, share) if math.isfinite(share) else 1.0)

    def scaled_to(self, live: float) -> Alarm:
        """The alarm for a loss of another kind: ``live``, its present value, has the same relative excess."""
        baseline = live - self.excess * abs(live)
        return Alarm(baseline, baseline, self.excess)


class HeldBatches:
    """Holds the last eight micro-batches, because the loss of a step is read only when the next one ends.

    Only references are held, to 256 MiB of tensors at most. If batches are larger, those of the step that has
    just ended are used, which are in memory anyway.
    """

    def __init__(self) -> None:
        self._held: deque[HeldBatch] = deque(maxlen=_MOST_BATCHES)
        self._ends = deque([(0, 0)], maxlen=3)  # the last steps, and the number of batches up to their end
        self._count = self._largest = 0

    def add(self, batch: Any, batch_idx: int) -> None:
        """Notes a micro-batch, before the training step can take anything out of it."""
        if self._count % _WEIGHED == 0:
            self._weigh(batch)
        self._held.append(HeldBatch(copied(batch), batch_idx))
        self._count += 1

    def _weigh(self, batch: Any) -> None:
        """Lowers the number of held batches to what fits, if all are as large as the largest so far."""
        self._largest = max(self._largest, _nbytes(batch))
        room = max(1, _MOST_BYTES // self._largest) if self._largest else _MOST_BATCHES
        if room < (self._held.maxlen or 0):
            self._held = deque(self._held, maxlen=room)

    def end_step(self, step: int) -> None:
        """Ends an optimizer step."""
        self._ends.append((step, self._count))

    def of(self, step: int) -> list[HeldBatch]:
        """The batches of a step; those of the newest step if they are no longer held."""
        first = self._count - len(self._held)
        for (_, begin), (last, end) in pairwise(self._ends):
            if last >= step and (found := self.all[max(0, begin - first) : max(0, end - first)]):
                return found
        return []

    @property
    def all(self) -> list[HeldBatch]:
        """All held batches, oldest first."""
        return list(self._held)


class Trial:
    """Tries the merge of some snapshots against the live weights, on all ranks together.

    Args:
        source: what the losses are computed on: ``"batch"`` or ``"validation"``.
        rehearse: opens a context in which losses can be computed with other weights.
        live: returns the live model's tensors.
        ranks: the run's ranks.
    """

    def __init__(
        self, source: str, rehearse: Callable[[], Rehearsal], live: Callable[[], ModelTensors], ranks: Ranks
    ) -> None:
        self.source, self.ranks = source, ranks
        self._rehearse, self._live = rehearse, live

    def hold(
        self,
        candidate: Callable[[ModelTensors], object],
        newest: Callable[[ModelTensors], object] | None,
        batches: Sequence[HeldBatch],
        alarm: Alarm,
    ) -> Evidence:
        """Computes the losses of the live weights and of those before the spike, then restores the live ones.

        That takes one pass over the batches if the live weights turn out sound, two if the candidate is no
        better, else three: a merge may be better than any single checkpoint, on hard data too, so the newest
        snapshot has to be clearly better as well.

        Args:
            candidate: overwrites the live parameters with those that would replace them.
            newest: overwrites them with the newest snapshot of the merge; ``None`` if that is the same.
            batches: this rank's batches of the step that raised the alarm.
            alarm: the alarm.

        Raises:
            UnrepeatableStepError: if a loss can't be computed, on this rank or another.
        """
        fewest = min(self.ranks.exchange(len(batches)))
        batches = batches[len(batches) - fewest :]
        with DeferredSignals() as signals, ExitStack() as stack:
            loss_of = self._agreed(lambda: stack.enter_context(self._rehearse()))
            with signals.let_through():
                return self._evidence(partial(self._loss, loss_of, batches), candidate, newest, alarm)

    def compare(self, candidate: Callable[[ModelTensors], object]) -> tuple[float, float]:
        """The losses of the live weights and of the candidate on a source that needs no held batches.

        Raises:
            UnrepeatableStepError: if a loss can't be computed, on this rank or another.
        """
        with DeferredSignals() as signals, ExitStack() as stack:
            loss_of = self._agreed(lambda: stack.enter_context(self._rehearse()))
            with signals.let_through():
                live = self._loss(loss_of, [])
                self._agreed(lambda: candidate(self._live()))
                return live, self._loss(loss_of, [])

    def _evidence(
        self,
        loss: Callable[[], float],
        candidate: Callable[[ModelTensors], object],
        newest: Callable[[ModelTensors], object] | None,
        alarm: Alarm,
    ) -> Evidence:
        """Computes the losses that are needed to decide."""
        live = loss()
        if self.source != "batch":
            alarm = alarm.scaled_to(live)
        if live <= alarm.threshold:
            return Evidence(self.source, live)
        self._agreed(lambda: candidate(self._live()))
        merged = single = loss()
        if not is_clearly_better(merged, live, alarm):
            return Evidence(self.source, live, merged)
        if newest is not None:
            self._agreed(lambda: newest(self._live()))
            single = loss()
        guilty = is_clearly_better(single, live, alarm)
        return Evidence(self.source, live, merged, single, guilty=guilty)

    def _loss(self, loss_of: LossOf, batches: Sequence[HeldBatch]) -> float:
        """The mean of all ranks."""
        own = self._agreed(lambda: loss_of(batches))
        losses = self.ranks.exchange(own)
        return sum(losses) / len(losses)

    def _agreed(self, action: Callable[[], T]) -> T:
        """The result of an action on this rank, once it has succeeded on all ranks."""
        problem: str | None = None
        try:
            found = action()
        except Exception as error:
            if DeferredSignals.has_raised(error):
                raise
            problem = str(error) if isinstance(error, UnrepeatableStepError) else repr(error)
        everyones = self.ranks.exchange(problem)
        if problems := [text for text in everyones if text]:
            raise UnrepeatableStepError(problems[0])
        return found


def copied(batch: Any) -> Any:
    """Copies a batch's containers but not its tensors: a training step may remove items from containers."""
    if isinstance(batch, Tensor):  # first: checking for a Mapping is slow
        return batch
    kind = type(batch)
    if kind is dict:
        # Asked here, too: this is done for every batch.
        return {key: v if isinstance(v, Tensor) else copied(v) for key, v in batch.items()}
    if kind in (list, tuple):
        return kind(map(copied, batch))
    return copy.copy(batch) if isinstance(batch, (Mapping, UserDict)) else batch


def _nbytes(value: Any, depth: int = 3) -> int:
    """Bytes of memory that the tensors in a batch keep alive, found through containers and attributes."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size() if value.is_sparse else value.untyped_storage().nbytes()
    if depth == 0 or isinstance(value, str):
        return 0
    if isinstance(value, (Mapping, UserDict)):
        return sum(_nbytes(item, depth - 1) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_nbytes(item, depth - 1) for item in value)
    return sum(_nbytes(item, depth - 1) for item in vars(value).values()) if hasattr(value, "__dict__") else 0
