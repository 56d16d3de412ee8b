"""The policy for spikes: what is to blame, what is restored, and when the run stops."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from merge_callback.messages import warn
from merge_callback.metrics import BASELINE, IS_SPIKING, LR_FACTOR, RESTORES, SCORE, THRESHOLD
from merge_callback.recovery.deferred_signals import DeferredSignals
from merge_callback.recovery.evidence import Evidence, HeldBatches
from merge_callback.recovery.inquiry import Inquiry
from merge_callback.recovery.restore import Recovery
from merge_callback.recovery.spike_log import RECORD, announce, append, number, sentence, sentence_of
from merge_callback.recovery.step_origins import StepOrigins
from merge_callback.signals.drift import DRIFT_STEPS
from merge_callback.signals.host import Host, report
from merge_callback.signals.spike_event import SpikeEvent
from merge_callback.signals.step_statistics import StepStatistics
from merge_callback.signals.watched_numbers import GRAD_NORM, LOSS, WatchedNumbers
from merge_callback.snapshots.live_merge import HalfRestoredError
from merge_callback.snapshots.snapshot import Snapshot
from merge_callback.snapshots.window import Window
from merge_callback.snapshots.window_merger import WindowMerger
from merge_callback.spike_options import SpikeOptions

log = logging.getLogger(__name__)

_LOWER = 0.5
"""The factor on the learning rate if older snapshots did not help."""

_UNMOVED = 20
"""In the first 1/20 of a re-warm-up, the losses still reflect the restored weights."""

_LASTING = 80
"""Steps within which a rise counts as lasting, if it is found again."""

_TRY = (
    "Known to help: a lower learning rate or tighter gradient clipping, qk-norm, z-loss, gradients "
    "accumulated in fp32, other data from there"
)


class TrainingDivergedError(RuntimeError):
    """The run keeps diverging, or diverged with nothing to restore; the message says what to try."""


@dataclass
class _Restores:
    """The restores so far."""

    count: int = 0
    in_a_row: int = 0  # without a success in between
    step: int | None = None  # of the last one
    clean: int = 0  # number of clean losses since then, at the full learning rate
    used: list[int] = field(default_factory=list)  # steps of its snapshots


class SpikePolicy:
    """Decides what to do about each spike of one fit, and does it.

    Args:
        options: what to do about spikes.
        host: the run.
        merger: returns the window's merger, once the last snapshot is in the window.
        numbers: the watched numbers; they are informed of the outcome of an event.
        batches: the batches of the last steps.
        statistics: the statistics of the fit's steps.
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
        numbers: WatchedNumbers,
        batches: HeldBatches,
        statistics: StepStatistics,
        dirpath: Path,
        last_good_merge: Callable[[int], Path | str | None],
    ) -> None:
        self.options, self.host, self._merger = options, host, merger
        self.numbers, self.statistics = numbers, statistics
        self.inquiry = Inquiry(options, host, merger, numbers, batches)
        self.origins = StepOrigins(host, statistics, merger)
        self.dirpath, self.last_good_merge = dirpath, last_good_merge
        self.recovery = Recovery(options, host, merger)
        self.restores = _Restores()
        self.is_half_restored = False  # a restore failed half way; nothing may be saved then
        self._suspicion: tuple[int, int] | None = (
            None  # onset of a rise that was the weights' fault, and the step of that finding
        )
        self._actions = options.watched
        self.before_writing: Callable[[], object] = lambda: None  # raises OSError if writing is not allowed
        self.after_restore: Callable[[int], object] = lambda step: None  # the newest restored snapshot's

    @property
    def window(self) -> Window:
        """The run's window, once the last snapshot is in it."""
        return self._merger().window

    def act(self, event: SpikeEvent, step: int) -> bool:
        """Does what the options say about an event; returns whether the live weights were replaced.

        Raises:
            TrainingDivergedError: if the run has to stop.
        """
        restores = self._action(event.watched) == "restore"
        if event.kind == "rise" and self._is_recovering:
            return False  # the rest of the last divergence heals by itself, or becomes a spike
        if event.kind == "shift":
            if restores and self._restore(event, step):
                return True
            self._find_sound(event)
        elif restores:
            return self._restore(event, step)
        elif event.kind == "rise":
            return False
        self._report(event, "shift" if event.kind == "shift" else "warn")
        return False

    def note_clean(self, step: int) -> None:
        """Notes a clean loss: enough of them make the last restore a success."""
        if self.restores.step is not None and step > self.restores.step + self.options.rewarm_steps:
            self.restores.clean += 1

    def report_drift(self, step: int, best: float, level: float) -> None:
        """Reports a loss that has crept up."""
        onset = max(1, step - DRIFT_STEPS + 1)
        self._publish_event(
            {"event": "drift", "trigger": LOSS, "onset": onset, "step": step, "best": best, "level": level}
        )

    def metrics(self, spike: float) -> dict[str, float]:
        """The logged metrics; ``spike`` is 1 while something speaks against the weights."""
        metrics = {
            IS_SPIKING: spike,
            RESTORES: float(self.restores.count),
            SCORE: self.numbers.score.value,
        }
        loss = self.numbers.loss
        if not math.isnan(threshold := loss.threshold):
            metrics |= {BASELINE: loss.baseline, THRESHOLD: threshold}
        if self.restores.count:
            metrics[LR_FACTOR] = self.recovery.lr.factor(self.host.step)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as primitives."""
        return {
            "recovery": self.recovery.state_dict(),
            "restores": asdict(self.restores),
            "origins": self.origins.state_dict(),
            "suspicion": list(self._suspicion) if self._suspicion else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self.recovery.load_state_dict(state["recovery"])
        self.restores = _Restores(**{**state["restores"], "used": list(state["restores"]["used"])})
        self.origins.load_state_dict(state["origins"])
        self._suspicion = tuple(state["suspicion"]) if state["suspicion"] else None

    @property
    def _is_recovering(self) -> bool:
        """Whether there was a restore that is not known to have helped yet."""
        return self.restores.step is not None and self.restores.clean < self.options.cooldown

    def _action(self, watched: str) -> str:
        if watched in (LOSS, GRAD_NORM):
            return self.options.action
        return next(
            action
            for pattern, action in self._actions.items()
            if fnmatchcase(watched.removeprefix("logged "), pattern)
        )

    def _restore(self, event: SpikeEvent, step: int) -> bool:
        """Restores the run, if there is something to restore and the evidence is against the live weights."""
        if self._suspicion and event.step - self._suspicion[1] > _LASTING:
            self._suspicion = None
        if self._suspicion:
            event = replace(event, onset=min(event.onset, self._suspicion[0]))
        in_a_row = self.restores.in_a_row + 1 if self._is_recovering else 1
        for line in self.window.drop_damaged():  # reading past the end of a cut file would kill the process
            warn(f"merge: left out of the window: {line}")
        snapshots, lower = self._choose(event.onset, in_a_row)
        evidence = self.inquiry.evidence(event, snapshots) if snapshots else None
        if evidence is None and event.kind != "spike":
            return False  # without evidence, only a spike is blamed on the weights
        if evidence is not None and not evidence.guilty:
            return self._acquit(event, evidence)
        if evidence is None and self.inquiry.compares_nothing(event):
            return self._give_up(event, "its optimizers take turns, so their losses can't be compared")
        if event.kind == "rise" and not self._is_lasting(event):
            return False
        if in_a_row > self.options.max_restores:
            self._stop(event, f"{in_a_row - 1} restores in a row did not help", evidence)
        if not snapshots:
            newest = event.onset - self.options.guard
            reason = f"no clean snapshot is older than step {newest}, so there is nothing to restore"
            return self._give_up(event, reason)
        lasting = self.recovery.lr.lasting * self.options.lr_factor * (_LOWER if lower else 1.0)
        seconds = -time.perf_counter()
        weights: list[float] | Exception
        with DeferredSignals():  # a checkpoint that a handler saves has the restored weights and their record
            try:
                weights = self.recovery.restore(snapshots, step, lasting)
            except Exception as error:
                log.exception("merge: the run could not be restored at step %s", step)
                weights = error
                self.is_half_restored = isinstance(error, HalfRestoredError)
            else:
                used = [snapshot.step for snapshot in snapshots]
                self.restores = _Restores(self.restores.count + 1, in_a_row, step, 0, used)
                self._forget_the_spike(used[-1])
        if isinstance(weights, HalfRestoredError):
            self._report(event, "stop", reason=f"the restore failed half way ({weights})")
            raise weights
        if isinstance(weights, Exception):
            return self._give_up(event, f"the restore failed ({weights!r})")
        seconds += time.perf_counter()
        self._report(
            event,
            "restore",
            restored_at=step,
            snapshots=[
                {"step": s.step, "tokens": s.tokens, "file": s.file, "weight": w}
                for s, w in zip(snapshots, weights, strict=True)
            ],
            method=self.options.merging.name,
            optimizer=getattr(self.options.optimizer, "__name__", self.options.optimizer),
            rewarm_steps=self.options.rewarm_steps,
            lr_factor=lasting,
            in_a_row=in_a_row,
            restores=self.restores.count,
            seconds=seconds,
            evidence=evidence and evidence.record(),
        )
        return True

    def _choose(self, onset: int, in_a_row: int) -> tuple[list[Snapshot], bool]:
        """The snapshots to restore, and whether to lower the learning rate.

        The second consecutive restore uses the window before the first one. Further restores reuse it and
        lower the learning rate, as does the second if nothing older exists. Snapshots taken after the first
        restore are only used if nothing else is left, oldest first.
        """
        newest, count = onset - self.options.guard, self.options.pma_window
        if in_a_row == 1:
            return self.window.before_spike(newest)[-count:], False
        used = self.restores.used
        older = self.window.before_spike(used[0] - 1)
        if in_a_row == 2 and older and older[-1].phase != "warmup":
            return older[-count:], False
        if known := self.window.before_spike(min(newest, used[-1])):
            return known[-count:], True
        since = self.window.before_spike(newest)
        return since[:count], in_a_row > 2 or len(since) <= count

    def _is_lasting(self, event: SpikeEvent) -> bool:
        """Whether the weights were found guilty of this rise before; most rises heal by themselves."""
        known, self._suspicion = self._suspicion is not None, (event.onset, event.step)
        return known

    def _acquit(self, event: SpikeEvent, evidence: Evidence) -> bool:
        """Notes that the data are to blame; their losses get a baseline of their own from now on."""
        self._suspicion = None
        if event.kind == "spike":
            self._find_sound(event)
            first = self.numbers[event.watched].acquit()
            if first:
                self._report(event, "hard data", evidence=evidence.record())
        return False

    def _find_sound(self, event: SpikeEvent) -> None:
        """Marks the weights since the event's onset as fit to be merged after all."""
        self.window.clear_in_spike(event.onset)
        self.restores.in_a_row = 0
        self.numbers.drift.restart()

    def _forget_the_spike(self, last_step: int) -> None:
        """Drops all records of the replaced weights."""
        self._suspicion = None
        self.numbers.restored(max(1, self.options.rewarm_steps // _UNMOVED))
        self.after_restore(last_step)
        try:
            self.window.drop_newer(last_step)
        except OSError as error:
            warn(f"merge: the window's manifest could not be written ({error}); training goes on")

    def _give_up(self, event: SpikeEvent, reason: str) -> bool:
        if self.options.no_snapshot == "stop":
            self._stop(event, reason, None)
        self._report(event, "warn", reason=f"{reason}; training goes on unchanged")
        return False

    def _stop(self, event: SpikeEvent, reason: str, evidence: Evidence | None) -> None:
        merge = self.last_good_merge(event.onset - self.options.guard)
        rate = max(float(g["lr"]) for optimizer in self.host.optimizers for g in optimizer.param_groups)
        seen = {
            "grad_norm": self.statistics.gradient_norm(self.inquiry.parameters),
            "lr": rate * self.recovery.lr.factor(self.host.step - 1),
            "evidence": evidence and evidence.record(),
        }
        self._report(event, "stop", reason=f"{reason}: stopped", last_good_merge=merge and str(merge), **seen)
        folder = self.window.store.folder
        good = f"the last good merge is {merge}" if merge else "no good merge was published"
        if folder is not None and self.window.snapshots:
            good += f", the last snapshots are in {folder}"
        tried = f" ({sentence_of(evidence.record())})" if evidence else ""
        raise TrainingDivergedError(
            f"the {event.trigger} left its baseline of {number(event.baseline)} at step {event.onset} (the "
            f"last value is {number(event.values[-1])}, the threshold {number(event.threshold)}) and {reason}"
            f"{tried}; the gradient norm is {seen['grad_norm']:.4g}, the learning rate {seen['lr']:.3g}; "
            f"{good}. {_TRY}; {self.dirpath / RECORD} has the whole story"
        )

    def _report(self, event: SpikeEvent, outcome: str, **more: Any) -> None:
        record = {"event": outcome, "trigger": event.trigger, **asdict(event), **more}
        del record["kind"]
        count = min(len(event.values), self.options.patience)
        record |= self.origins.of(event.step, count, event.threshold if event.watched == LOSS else math.nan)
        self._publish_event(record)
        report(self.host, self.metrics(1.0 if outcome in ("restore", "warn", "stop") else 0.0))

    def _publish_event(self, record: dict[str, Any]) -> None:
        """Records an event, reports it, and passes it to the user's function."""
        if self._merger().ranks.is_first:
            event = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **record}
            append(self.dirpath, event, self.before_writing)
            self.host.record("spike", record["step"], record=record, text=sentence(record))
        announce(self.host, record)
        if self.options.on_spike is None:
            return
        wants_stop = False
        try:
            wants_stop = self.options.wants_stop(record)
        except Exception:
            log.exception("merge: spike.on_spike failed; training goes on")
        if any(self._merger().ranks.exchange(wants_stop)):
            self.host.stop()
