"""Finds the cause of a spike: which weights are tried on which batches, and in which order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from merge_callback.messages import warn
from merge_callback.recovery import optimizer_state
from merge_callback.recovery.evidence import (
    Alarm,
    Evidence,
    HeldBatches,
    Trial,
    is_clearly_better,
)
from merge_callback.sharding import local, overwrite
from merge_callback.signals.host import HeldBatch, Host, UnrepeatableStepError
from merge_callback.signals.spike_event import SpikeEvent
from merge_callback.signals.watched_numbers import LOSS, WatchedNumbers
from merge_callback.snapshots.arena import all_finite
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.snapshot import Snapshot
from merge_callback.snapshots.window_merger import WindowMerger
from merge_callback.spike_options import SpikeOptions

_AS_IT_WAS = 0.5
"""By what share a validation's loss may exceed the last one and still count as unchanged."""


class Inquiry:
    """Finds out, after an alarm, whether the weights or the data are to blame.

    Args:
        options: what counts as evidence, and how snapshots are merged.
        host: the run.
        merger: returns the window's merger, once the last snapshot is in the window.
        numbers: the watched numbers.
        batches: the batches of the last steps.
    """

    def __init__(
        self,
        options: SpikeOptions,
        host: Host,
        merger: Callable[[], WindowMerger],
        numbers: WatchedNumbers,
        batches: HeldBatches,
    ) -> None:
        self.options, self.host, self._merger = options, host, merger
        self.numbers, self.batches = numbers, batches
        self._warned_of: set[str] = set()  # sources that can't be tried

    @property
    def parameters(self) -> list[Tensor]:
        """All trained parameters, in the optimizers' order."""
        groups = (group for optimizer in self.host.optimizers for group in optimizer.param_groups)
        return [parameter for group in groups for parameter in group["params"]]

    def weights_are_finite(self) -> bool:
        """Whether weights, buffers and optimizer state are finite, on all ranks."""
        own = all(all_finite(local(parameter.data)) for parameter in self.parameters)
        own = own and all(map(optimizer_state.is_finite, self.host.optimizers))
        model, store = self._live(), self._merger().window.store
        buffers = ((name, model.tensors[name]) for name in model.buffers)
        own = own and all(all_finite(buffer) or store.may_hold(name, buffer) for name, buffer in buffers)
        return all(self._merger().ranks.exchange(own))

    def evidence(self, event: SpikeEvent, snapshots: Sequence[Snapshot]) -> Evidence | None:
        """The evidence for or against the live weights; ``None`` if only the watched numbers speak.

        Args:
            event: the event that raised the question.
            snapshots: their merge would replace the live weights; oldest first.
        """
        if not all(map(math.isfinite, event.values)) and not self.weights_are_finite():
            return Evidence("weights", math.nan, guilty=True)
        if self.numbers.takes_turns:
            return None  # weights that help one of the opponents may harm the other
        alarm, loss = Alarm.of(event.baseline, event.threshold, event.values[-1]), self.numbers.loss
        if event.watched != LOSS:
            alarm = replace(alarm, baseline=loss.baseline, threshold=loss.threshold)
        batches = self._batches_for(event)
        # Only those with a gradient, since an optimizer may hold all parameters of a module. They are
        # collected here because there are no gradients during a trial.
        parameters = self.parameters
        trained = {id(p) for p in parameters if p.grad is not None} or set(map(id, parameters))
        candidate = partial(self._put_in, snapshots, trained)
        newest = partial(self._put_in, snapshots[-1:], trained) if len(snapshots) > 1 else None
        for trial in self._trials():
            try:
                if trial.source == "validation":
                    candidate, newest = partial(self._put_in_all, snapshots), None
                found = [trial.hold(candidate, newest, batches[0], alarm)]
                if not found[0].guilty and trial.source == "batch":
                    found += [trial.hold(candidate, newest, others, alarm) for others in batches[1:]]
            except UnrepeatableStepError as error:
                self._tell_once(trial.source, error)
                continue
            evidence = next((each for each in found if each.guilty), found[0])
            return self._hear_validation(evidence, snapshots, alarm)
        return None

    def compares_nothing(self, event: SpikeEvent) -> bool:
        """Whether losses would have to decide for lack of evidence, although they are those of opponents."""
        finite = all(map(math.isfinite, event.values))
        return finite and self.options.evidence != "rules" and self.numbers.takes_turns

    def _batches_for(self, event: SpikeEvent) -> list[list[HeldBatch]]:
        """The sets of batches that an event is tried on in turn, until one speaks against the weights.

        First those of its step; then those of the next step, which were not selected by an alarm: if only
        some batches are bad, weights that are broken as well would else be found sound. A rise is small, so
        it is tried on all held batches at once.
        """
        if event.kind == "rise":
            return [self.batches.all]
        return [self.batches.of(event.step), self.batches.of(event.step + 1)]

    def _hear_validation(self, evidence: Evidence, snapshots: Sequence[Snapshot], alarm: Alarm) -> Evidence:
        """Lets the validation loss clear live weights that the training loss has found guilty.

        A training loss may rise by design: parts of the model work against it (gradient reversal), or it does
        not measure what is learned (policy gradients). The weights are cleared if their validation loss is
        about what it was last time, and the candidate's is not clearly better.
        """
        if not evidence.guilty or evidence.source != "batch" or not math.isfinite(evidence.live):
            return evidence
        (trial,) = self._trials()[1:]
        try:
            live, merged = trial.compare(partial(self._put_in_all, snapshots))
        except UnrepeatableStepError:  # there is no validation, or none yet
            return evidence
        last = self.host.validation_loss()
        is_sound = live <= last + _AS_IT_WAS * abs(last)
        is_sound = is_sound and not is_clearly_better(merged, live, alarm.scaled_to(live))
        return replace(evidence, validation=(live, merged), guilty=not is_sound)

    def _tell_once(self, source: str, error: Exception) -> None:
        if source not in self._warned_of:
            self._warned_of.add(source)
            warn(
                f"merge: the weights before the spike could not be tried on the {source}: {error}; so "
                f"{'the validation decides, or ' if source == 'batch' else ''}the losses alone decide, "
                "whether to restore"
            )

    def _trials(self) -> list[Trial]:
        ranks = self._merger().ranks
        wanted = {"batch": ("batch", "validation"), "validation": ("validation",), "rules": ()}
        return [
            Trial(source, partial(self.host.rehearse, source), self._live, ranks)
            for source in wanted[self.options.evidence]
        ]

    def _live(self) -> ModelTensors:
        return ModelTensors.of(self.host.module, self.host.root)

    def _put_in(self, snapshots: Sequence[Snapshot], trained: set[int], model: ModelTensors) -> None:
        """Overwrites only the trained parameters with the merge of some snapshots.

        Buffers (a queue) and parameters that get no gradient (a target network, a teacher) keep the live
        model's values: here they count as data.
        """
        merger = self._merger()

        def keep() -> dict[str, Tensor]:
            names = {model.names.get(parameter) for parameter in trained}
            others = model.tensors.keys() - names - merger.constant(model)
            return {name: model.tensors[name].clone() for name in others}

        kept = merger.ranks.agreed(keep)
        merger.merge_into(model, snapshots, self.options.merging)
        for name, values in kept.items():
            overwrite(model.tensors[name], values)

    def _put_in_all(self, snapshots: Sequence[Snapshot], model: ModelTensors) -> None:
        """Overwrites all tensors: in a validation, running statistics have to fit the parameters."""
        self._merger().merge_into(model, snapshots, self.options.merging)
