"""Feeds each optimizer step's numbers to the detectors, and their events to the policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from merge_callback.messages import warn
from merge_callback.recovery.evidence import HeldBatches
from merge_callback.recovery.spike_policy import SpikePolicy
from merge_callback.sharding import local
from merge_callback.signals.host import Host, report
from merge_callback.signals.loss_scale import gradient_scale
from merge_callback.signals.lr_phase import Warmup
from merge_callback.signals.spike_event import SpikeEvent
from merge_callback.signals.step_statistics import Statistics, StepStatistics, dense
from merge_callback.signals.watched_numbers import WatchedNumbers
from merge_callback.snapshots.arena import all_finite
from merge_callback.snapshots.window_merger import WindowMerger
from merge_callback.spike_options import SpikeOptions


class SpikeWatch:
    """Watches the numbers of one fit, and has the run restored after a spike that is the weights' fault.

    Args:
        options: what counts as a spike, and what to do about it.
        host: the run.
        merger: returns the window's merger, once the last snapshot is in the window.
        statistics: the statistics of the fit's steps; this adds gradients and further scalars to them.
        dirpath: the folder of the events' record.
        last_good_merge: finds the newest published merge without a snapshot taken after a step.

    Raises:
        ValueError: if an optimizer's state can't be reset.
    """

    def __init__(
        self,
        options: SpikeOptions,
        host: Host,
        merger: Callable[[], WindowMerger],
        statistics: StepStatistics,
        dirpath: Path,
        last_good_merge: Callable[[int], Path | str | None],
    ) -> None:
        self.options, self.host, self.statistics = options, host, statistics
        self.numbers, self.batches = WatchedNumbers(options), HeldBatches()
        self.policy = SpikePolicy(
            options, host, merger, self.numbers, self.batches, statistics, dirpath, last_good_merge
        )
        self._merger = merger
        self._new_scalars = host.logged_scalars([*options.watch]) if options.watch else None
        self._scalar_names: set[str] = set()
        statistics.names = [] if options.watch else None
        self._several = len(host.optimizers) > 1
        self._stepped: set[int] = set()  # optimizers that have stepped since the last step ended
        self._optimizers = ["", ""]  # those of the last but one step, and of the last step
        self._batch_idx = 0
        self._seen = host.step  # the last step whose loss was read
        self._warned_of_no_loss = False

    @property
    def is_within_baseline(self) -> bool:
        """Whether none of the numbers read so far speaks against the weights."""
        return self.numbers.is_within_baseline

    @property
    def loss_scale(self) -> Tensor | None:
        """The loss scale of fp16 training; ``None`` without one."""
        scaler = self.policy.recovery.scaler
        return scaler._scale if scaler else None

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Notes a micro-batch before it is trained on."""
        self._batch_idx = batch_idx
        self.batches.add(batch, batch_idx)

    def note_step(self, optimizer: Optimizer) -> None:
        """Notes which optimizer is about to step and, if it is watched, the norm of its gradients."""
        if self._several:
            self._stepped.add(next(i for i, o in enumerate(self.host.optimizers) if o is optimizer))
        if self.options.grad_norm:
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            scale = gradient_scale(optimizer, self.policy.recovery.scaler)
            self.statistics.add_gradients(parameters, scale)

    def note_end_of_step(self, step: int) -> None:
        """Notes what belongs to the step that ends, before its statistics are sent."""
        self.batches.end_step(step)
        self.policy.origins.end_step(step, self._batch_idx)
        if self._new_scalars:
            values = self._new_scalars()
            self._scalar_names.update(values)
            self.statistics.add_scalars(values)
        if self._several:
            self._optimizers = [self._optimizers[1], ",".join(map(str, sorted(self._stepped)))]
            self._stepped.clear()

    def end_step(self, step: int, warmup: Warmup, statistics: Statistics | None) -> bool:
        """Reads the statistics of the previous step, and acts on them.

        Returns:
            Whether the live weights were replaced.

        Raises:
            TrainingDivergedError: if the run has to stop.
        """
        self.policy.recovery.lr.end_step(step)
        restored = False
        if statistics is not None:
            for event in self._observe(statistics, warmup):
                restored = restored or self.policy.act(event, step)
        if restored:
            self.statistics.forget()
            self._seen = step
        every = self.host.log_every
        if every and step % every == 0 and not restored:
            report(self.host, self.policy.metrics(0.0 if self.is_within_baseline else 1.0))
        return restored

    def close(self) -> None:
        """Sets the learning rates back to the schedule's."""
        self.policy.recovery.lr.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as primitives."""
        return {
            "numbers": self.numbers.state_dict(),
            "policy": self.policy.state_dict(),
            "seen": self._seen,
            "optimizers": list(self._optimizers),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict`` as if there had been no break."""
        self.numbers.load_state_dict(state["numbers"])
        self.policy.load_state_dict(state["policy"])
        self._seen, self._optimizers = state["seen"], list(state["optimizers"])

    def _observe(self, seen: Statistics, warmup: Warmup) -> list[SpikeEvent]:
        """The events that the detectors report for a step, spikes first."""
        if seen.loss is None and not self._warned_of_no_loss:
            self._warned_of_no_loss = True
            warn("merge: training_step returned no loss, so no spike can be seen: return it, or {'loss': …}")
        if seen.unknown_scalars and self._new_scalars:
            self._agree_on_scalars()
        events = self.numbers.observe(seen, warmup, self._optimizers[0], self._is_broken)
        if not self.numbers.is_within_baseline:
            if self._merger().window.mark_in_spike(self._seen, seen.step):
                self._merger().forget()
        elif self.numbers.loss.onset is None:
            self.policy.note_clean(seen.step)
        self._seen = seen.step
        if not events and (drift := self.numbers.drifted(seen, warmup)):
            self.policy.report_drift(seen.step, *drift)
        return events

    def _agree_on_scalars(self) -> None:
        """Agrees with all ranks on one order of the further scalars."""
        assert self.statistics.names is not None
        everyones = self._merger().ranks.exchange(sorted(self._scalar_names))
        new = {name for names in everyones for name in names}.difference(self.statistics.names)
        self.statistics.names = [*self.statistics.names, *sorted(new)]

    def _is_broken(self) -> bool:
        """Whether weights, optimizer state or gradients are not finite, on any rank."""
        if not self.policy.inquiry.weights_are_finite():
            return True
        gradients = [p.grad for p in self.policy.inquiry.parameters if p.grad is not None]
        sound = all(all_finite(dense(local(gradient))) for gradient in gradients)
        return not all(self._merger().ranks.exchange(sound))
