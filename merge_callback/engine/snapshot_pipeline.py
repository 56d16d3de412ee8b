"""Processes snapshots in the background: store, measure, merge, publish, log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, SupportsFloat, TypeVar

from merge_callback.engine.advice import Advice
from merge_callback.engine.background import Background, Done
from merge_callback.engine.candidates import Candidates, Evaluate, Lower, Scores, Source
from merge_callback.engine.comparison import Comparison
from merge_callback.engine.emissions import Emissions
from merge_callback.engine.history import History
from merge_callback.engine.probe import Probe
from merge_callback.engine.snapshot_report import LayerDiversity, SnapshotReport
from merge_callback.engine.validations import Scored, closing_line, gains
from merge_callback.messages import info, warn
from merge_callback.options import Options
from merge_callback.publish import Publisher
from merge_callback.publish.export import Naming
from merge_callback.recovery.schedule_free import evaluated_weights
from merge_callback.signals.host import Host
from merge_callback.signals.host import log as log_metrics
from merge_callback.signals.lr_phase import Phase
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.live_copy import Captured
from merge_callback.snapshots.merge import Merge, NonFiniteMergeError
from merge_callback.snapshots.running import RunningAverages
from merge_callback.snapshots.snapshot import Snapshot
from merge_callback.snapshots.window import Window
from merge_callback.snapshots.window_merger import WindowMerger

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_PATIENCE = 600.0  # seconds that a checkpoint waits for the work under way

_NOTICEABLE = 1.0  # seconds of waiting from which on the user is warned


class SnapshotPipeline:
    """Keeps a window while a model trains: only the copy of the weights is made in the training thread.

    For each copy, a background job adds it to the window, measures and merges; a second job publishes the
    merge. Until the first job is done, nothing else may use the window, nor communicate with the other ranks
    through its group: ``window``, ``merger`` and all their users wait for it.

    Args:
        options: the callback's options.
        host: the run.
        window: the run's window.
        publisher: publishes the emissions.
        naming: the published names of the tensors.
        running: the running averages, if there are any.
    """

    def __init__(
        self,
        options: Options,
        host: Host,
        window: Window,
        publisher: Publisher,
        naming: Naming,
        running: RunningAverages | None = None,
    ) -> None:
        self.options, self.host, self.publisher, self.naming = options, host, publisher, naming
        self.background = Background(window.store.live_device)
        lag = max(1, min(options.diversity_lag, options.window - 1))
        self._window = window
        self._validates = options.evaluate and host.will_validate and options.experts is None
        self._merger = WindowMerger(
            window,
            options.methods,
            lag,
            options.exclude,
            options.lora,
            candidates=options.candidates if self._validates else {},
            processes=host.processes,
        )
        self.running = running
        self.probe = Probe(options.probe, host, window, lag) if options.probe else None
        self.history = History(options.select)
        sources: list[Source] = [self._merger, *([running] if running else [])]
        self.candidates = Candidates(sources, options.evaluate_batches, window.ranks, self.history)
        self.emissions = Emissions(
            options, host, window, publisher, naming, self.candidates, self.history, self.background
        )
        self._taken = 0
        trained = window.store.whole.only(window.store.whole.names - window.store.expected)
        numel = sum(group.numel for group in trained.groups)
        self.advice = Advice(options.window, numel, host.total_steps)
        self._pending: Done | None = None  # set when the last snapshot is in the window
        self._reports: list[SnapshotReport] = []
        self._layers = LayerDiversity()
        self._logged: dict[str, float] = {}  # metrics that loggers have, and callbacks do not have yet
        self._warned_of_waiting = False

    @property
    def window(self) -> Window:
        """The window, once the last snapshot is in it."""
        self.wait_until_merged()
        return self._window

    @property
    def merger(self) -> WindowMerger:
        """The window's merger, once it has processed the last snapshot."""
        self.wait_until_merged()
        return self._merger

    @property
    def stored_snapshots(self) -> list[Snapshot]:
        """The window's snapshots; the last one may still be on its way there."""
        return self._window.snapshots

    def take(
        self, snapshot: Snapshot, phase: Phase, live: ModelTensors | Exception, may_publish: bool
    ) -> None:
        """Copies the live weights, and has the copy stored, measured, merged and published in the background.

        If the previous snapshot is not in the window yet, storage is slower than the interval. The run then
        waits for it, because it would else skip snapshots or take ever more memory.

        Args:
            snapshot: the snapshot's metadata.
            phase: the phase of the learning rate.
            live: the live model's tensors, or the error that kept them from being read.
            may_publish: whether a merge may be published: not while the loss is an outlier.
        """
        stall = -time.monotonic()
        self._wait_for_the_last(snapshot.step)
        hold = self.emissions.begin_interval(self._validates)
        report = SnapshotReport(self.host.log_step, phase, snapshot)
        with evaluated_weights(self.host.optimizers):
            report.features = self.probe.run() if self.probe else None
            model, captured = self._capture(live, snapshot.step)
        report.averages = self.running.copies(snapshot.step) if self.running else []
        report.stall = stall + time.monotonic()
        emit = may_publish and self.options.emit_every > 0
        self._pending = self.background.submit(partial(self._keep, model, captured, report, emit, hold))

    def wait_until_merged(self) -> None:
        """Waits until the last snapshot is in the window, measured and merged; all ranks do so together."""
        if self._pending is None or self.background.is_current:
            return
        self._pending.wait()
        self._pending = None
        self.log_pending()
        self.host.expose(self._logged)
        self._logged = {}

    def wait_for_last(self) -> None:
        """Waits until the last snapshot is in the window, some minutes at most; each rank may do so alone."""
        if self._pending is not None and not self.background.is_current:
            self._pending.wait(_PATIENCE)

    def log_pending(self) -> None:
        """Logs the snapshots that are in the window by now; each rank does so at its own time."""
        while self._reports:
            self._log(self._reports.pop(0))

    def wait(self) -> None:
        """Waits until everything is written, for some minutes at most: other ranks may be gone."""
        self.background.drain(_PATIENCE)

    def finish_what_is_begun(self) -> None:
        """Waits until the last snapshot is in the window and every submitted merge is published."""
        self.wait_until_merged()
        self.emissions.release()
        self.background.drain()

    def current_merge(self, model: ModelTensors, merger: WindowMerger | None = None) -> Merge | None:
        """The merge of the present window; ``None`` if there is none, or if it can't be made.

        Args:
            model: the live model's tensors.
            merger: another merger of the window than the one whose merges are published.
        """
        self.wait_until_merged()
        try:
            self._warn_of_cuts()
            return self._without_altered(partial(self._agreed_merge, model, merger or self._merger))
        except Exception:
            log.exception("merge: the window could not be merged; training goes on")
            return None

    def note_validation(self, live: Mapping[str, SupportsFloat], scored: Scored) -> dict[str, float]:
        """What is logged of a merge's validation besides its metrics; see ``Advice.after_validation``."""
        if scored.newest is None:
            return gains(live, scored.metrics, scored.lower)
        metrics, line = self.advice.after_validation(scored.newest, live, scored.metrics, scored.lower)
        if line:
            self._advise(scored.newest.step, line)
        return metrics

    def compare(
        self, model: ModelTensors, default: Merge, evaluate: Evaluate, live: Scores, lower: Lower
    ) -> Comparison | None:
        """Validates the candidates; see ``Candidates.compare``.

        Raises:
            Exception: on all ranks, whatever ``evaluate`` raises.
        """
        return self.candidates.compare(model, default, evaluate, live, lower, default.snapshots[-1].phase)

    def keep_validation(
        self,
        scored: Scored | None,
        at: Mapping[str, Any],
        live: Scores,
        logged: Mapping[str, float],
        lower: Mapping[str, bool | None],
    ) -> int | None:
        """Keeps what a validation has found, and publishes the merge that waited for it.

        Another emission may be the best by it.

        Args:
            scored: what a merge scores, if one was validated.
            at: see ``History.add_validation``; so for the others.
            live: what the live weights score.
            logged: what is logged of the merge.
            lower: whether lower is better, by metric.

        Returns:
            The step of the merge that has these scores; ``None`` if there is none.
        """
        step = self.emissions.scored_step(scored)
        self.history.add_validation(at, live, logged, step, lower)
        self.emissions.note_validation(scored)
        return step

    def newest_emission_up_to(self, step: int) -> Path | str | None:
        """The newest published merge without a snapshot taken after ``step``."""
        self.wait_until_merged()
        self.emissions.release()
        self.wait()
        return self._window.ranks.from_first(self.publisher.newest_up_to(step))

    def finish(self, model: ModelTensors, step: int) -> None:
        """Publishes the last merge of the run, unless it is published already."""
        self.finish_what_is_begun()
        self.emissions.agree_on_last()
        self.background.submit(partial(self._emit, model))  # a failure there is logged
        self.background.drain()
        if self.publisher.published:
            count, best = self.emissions.count, self.emissions.best
            info(closing_line(self.advice.validations, count, self.publisher, best, self._spread()))
        elif self.options.experts is None:
            warn(f"merge: nothing was published: {self._why_nothing(step)}")

    def _why_nothing(self, step: int) -> str:
        """Why there is no merge after ``step`` optimizer steps, and what to do."""
        options, snapshots = self.options, self._window.snapshots
        shorter = f"choose a shorter interval than every_n_{options.unit}={options.every}"
        if not step:
            return (
                "no optimizer step was counted; in a manual optimization, step the optimizers that "
                "self.optimizers() returns"
            )
        if not snapshots:
            failed = f"no snapshot was kept in {step} steps"
            return f"{failed}; {shorter}, if no warning above says more"
        count = f"{len(snapshots)} snapshot{'s' * (len(snapshots) > 1)} in {step} steps"
        if all(snapshot.phase == "warmup" for snapshot in snapshots):
            return f"{count}, all of the warm-up, which is never merged; train longer, or {shorter}"
        if not self._window.segment():
            phases = ", ".join(sorted({snapshot.phase for snapshot in snapshots}))
            return f"{count} ({phases}), but a merge takes two of one phase after the warm-up; {shorter}"
        return f"{count}, but their merge could not be made or written; see the warnings above"

    def publish_held(self) -> None:
        """Publishes what is held back when a run ends by an exception, unless other ranks may be gone."""
        if self._window.ranks.size == 1:
            self.wait()
            self.emissions.release()
            self.wait()

    def close(self) -> None:
        """Closes the process group of publishing. All ranks have to call this."""
        self.emissions.close()

    def state_dict(self, to_keep: bool = True) -> dict[str, Any]:
        """What a resumed run needs, as primitives; see ``Window.state_dict`` for ``to_keep``.

        A checkpoint waits until the last snapshot is in the window, but not until its merge is published.
        """
        self.wait_for_last()
        try:
            self.log_pending()
        except Exception:  # a checkpoint is worth more than a curve
            log.exception("merge: a snapshot could not be logged")
        running = {"running": self.running.state_dict(to_keep)} if self.running else {}
        further = self.running.files.needed() if self.running else ()
        return {
            **running,
            "run_id": self._window.folder.run_id,
            "taken": self._taken,
            **self.emissions.state_dict(),
            "advice": self.advice.state_dict(),
            "window": self._window.state_dict(to_keep, further),
            "first_diversity": self._merger.first_rms,
            "diversity": self._merger.diversity,
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores everything from a ``state_dict``, except the window."""
        self._taken = state["taken"]
        if "advice" in state:  # older versions have none
            self.advice.load_state_dict(state["advice"])
        self.history.load_state_dict(state.get("history", {}))
        self._merger.first_rms, self._merger.diversity = state["first_diversity"], state["diversity"]
        self.emissions.load_state_dict(state)

    def publish_again(self, model: ModelTensors, state: Mapping[str, Any]) -> None:
        """Publishes what the resumed run was to publish but did not, or holds it back again."""
        last = state.get("handed_in", -1)
        segment = self._window.segment()
        if self.emissions.is_missing(last) and segment and segment[-1].step == last:
            hold = self._validates and not self.emissions.is_validated(last)
            self.background.submit(partial(self._emit, model, hold)).wait()

    def _capture(self, live: ModelTensors | Exception, step: int) -> tuple[ModelTensors, Captured]:
        """A copy of the live weights, or the error, which the other ranks have to learn of."""
        if isinstance(live, Exception):
            return ModelTensors(), Captured(error=live)
        return live, self._window.capture(live.tensors, live.frozen, step)

    def _wait_for_the_last(self, step: int) -> None:
        waited = -time.monotonic()
        self.wait_until_merged()
        waited += time.monotonic()
        if waited > _NOTICEABLE and not self._warned_of_waiting:
            self._warned_of_waiting = True
            warn(
                f"merge: the run waited {waited:.1f} s at step {step} until the previous one was stored: "
                "storage is slower than the interval; choose a longer one, or a faster dirpath"
            )

    # In the background, one job after the other.

    def _keep(
        self, model: ModelTensors, captured: Captured, report: SnapshotReport, may_publish: bool, hold: bool
    ) -> None:
        """Adds a captured snapshot to the window, then measures, merges and publishes.

        A failure is logged; the run goes on.
        """
        try:
            if self.running:
                self.running.store(report.averages)
            self._take_in(model, captured, report, may_publish, hold)
        except Exception:
            log.exception("merge: the snapshot of step %s failed; training goes on", report.snapshot.step)

    def _take_in(
        self, model: ModelTensors, captured: Captured, report: SnapshotReport, may_publish: bool, hold: bool
    ) -> None:
        seconds = -time.monotonic()
        self._warn_of_cuts()  # first, because a delta is taken to a snapshot in the window
        if not self._append(report.snapshot, captured):
            return
        self._taken += 1
        if self.probe and report.features:
            report.functional = self.probe.compare(report.features)
        emit = may_publish and self._taken % self.options.emit_every == 0
        self._without_altered(partial(self._merger.measure, model, merge=emit or self._validates))
        if emit:
            self._emit(model, hold)
        report.window = [kept.step for kept in self._window.snapshots]
        report.segment = self._window.segment()
        report.diversity = self._merger.diversity
        self._reports.append(report)
        self._record(report, seconds + time.monotonic())

    def _record(self, report: SnapshotReport, seconds: float) -> None:
        self.host.record(
            "snapshot",
            report.snapshot.step,
            **report.record,
            bytes=self._window.store.sizes[len(report.window) > 1],
            background=seconds,
            layers=self._layers.of(self._merger.rms_by_tensor),
        )

    def _append(self, snapshot: Snapshot, captured: Captured) -> bool:
        """Adds a captured snapshot to the window; returns whether that succeeded."""
        try:
            self._window.add(snapshot, captured)
        except (ValueError, RuntimeError, MemoryError) as error:  # not finite, a changed model, no memory
            warn(f"merge: no snapshot at step {snapshot.step}: {error}")
        except OSError as error:
            warn(f"merge: the snapshot of step {snapshot.step} could not be kept in a file ({error})")
        return bool(self._window.snapshots) and self._window.snapshots[-1] is snapshot

    def _emit(self, model: ModelTensors, hold: bool = False) -> None:
        """Publishes the merge of the present window, if it is new, or holds it back for its validation."""
        if (merge := self.current_merge(model)) is not None:
            self.emissions.hand_in(merge, model, self._merger.diversity, hold)

    def _spread(self) -> float | None:
        """The standard deviation of the noise of the live metric that is spoken of, in the present phase."""
        known = self.advice.validations
        return self.history.spread(known.metric, known.recent[-1].phase) if known.recent else None

    def _warn_of_cuts(self) -> None:
        for line in self._window.drop_cut():
            warn(f"merge: left out of the window: {line}")

    def _agreed_merge(self, model: ModelTensors, merger: WindowMerger) -> Merge | None:
        """The merge of the present window, if every rank could make its part of it.

        Raises:
            Exception: the error of a rank that could not.
        """
        merge: Merge | None = None
        problem: Exception | None = None
        try:
            merge = merger.current(model)
        except Exception as error:
            problem = error
        try:
            self._window.ranks.agree(problem)
        except Exception:
            merger.forget()  # also on the ranks that succeeded
            raise
        return merge

    def _without_altered(self, merge: Callable[[], _T]) -> _T:
        """Merges; if the result is not finite, merges once more without the snapshots whose files changed.

        Args:
            merge: a function that raises on all ranks if it does on one.
        """
        try:
            return merge()
        except Exception as error:
            spoilt = any(self._window.ranks.exchange(isinstance(error, NonFiniteMergeError)))
            lost = self._window.drop_damaged() if spoilt else []
            if not lost:
                raise
        for line in lost:
            warn(f"merge: left out of the window: {line}")
        return merge()

    # In training's thread again.

    def _log(self, report: SnapshotReport) -> None:
        snapshot, metrics = report.snapshot, report.metrics
        log_metrics(self.host, metrics, snapshot.step, report.logged_step)
        self._logged |= metrics
        self.history.add_snapshot(snapshot, metrics)
        if line := self.advice.after_snapshot(snapshot, report.segment, report.diversity):
            self._advise(snapshot.step, line)

    def _advise(self, step: int, line: str) -> None:
        info(line)
        self.host.record("advice", step, text=line)
