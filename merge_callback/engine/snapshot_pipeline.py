"""What becomes of a snapshot, in the background: it is kept, measured, merged, published and logged."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from merge_callback.engine.advice import advice
from merge_callback.engine.background import Background
from merge_callback.messages import info, warn
from merge_callback.options import Options
from merge_callback.publish import Publisher
from merge_callback.publish.export import Exporter, Naming
from merge_callback.recovery.schedule_free import evaluated_weights
from merge_callback.sharding import Ranks
from merge_callback.signals.host import Host
from merge_callback.signals.lr_phase import Phase
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.live_copy import Captured
from merge_callback.snapshots.merge import Merge, NonFiniteMergeError, WindowMerger
from merge_callback.snapshots.snapshot import Snapshot
from merge_callback.snapshots.window import Window

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_PATIENCE = 600.0  # seconds that what is under way may take, once a checkpoint waits for it

_NOTICEABLE = 1.0  # seconds of waiting that the user is told of


@dataclass
class _Report:
    """What is logged of a snapshot, and at which step."""

    logged_step: int
    phase: Phase
    snapshot: Snapshot
    window: int = 0
    diversity: dict[str, Any] | None = None


class SnapshotPipeline:
    """Keeps a window while a model trains: only the copy of the weights is made in training's own thread.

    A job in the background takes each copy into the window, measures and merges; a second one publishes the
    merge. Until the first one is done, nobody else may use the window, nor talk to the other ranks through
    its group: ``window``, ``merger`` and all that needs them wait for it.

    Args:
        options: the callback's.
        host: the run.
        window: of the run.
        publisher: of the emissions.
        naming: how the tensors are called outside.
    """

    def __init__(
        self, options: Options, host: Host, window: Window, publisher: Publisher, naming: Naming
    ) -> None:
        self.options, self.host, self.publisher, self.naming = options, host, publisher, naming
        self.background = Background(host.device)
        self.publish_group = Ranks.of_run()  # for what is published, while others use the window's group
        lag = max(1, min(options.diversity_lag, options.window - 1))
        self._window = window
        self._merger = WindowMerger(window, options.methods, lag, options.exclude)
        self._exporter = Exporter(
            publisher, window.store.sharding, naming, self.publish_group, options.format == "dcp"
        )
        self._taken = 0
        self._emitted = self._handed_in = -1  # what is published; what was to be, which all ranks know
        self._advised: list[str] = []
        self._pending: threading.Event | None = None  # set when the last snapshot is in the window
        self._reports: list[_Report] = []
        self._logged: dict[str, float] = {}  # what loggers know already, and callbacks are still to be shown
        self._told_to_wait = False

    @property
    def window(self) -> Window:
        """The window, once the last snapshot is in it."""
        self.wait_until_merged()
        return self._window

    @property
    def merger(self) -> WindowMerger:
        """The window's merger, once it has done with the last snapshot."""
        self.wait_until_merged()
        return self._merger

    @property
    def has_news(self) -> bool:
        """Whether there is something to log."""
        return bool(self._reports)

    def take(self, snapshot: Snapshot, phase: Phase, live: ModelTensors | Exception, calm: bool) -> None:
        """Copies the live weights, and has the copy kept, measured, merged and published.

        Where the snapshot before is not in the window yet, storage is slower than the interval: the run waits
        for it, rather than skip a snapshot or take up ever more memory.

        Args:
            snapshot: what is known of it.
            phase: of the learning rate.
            live: the live model's tensors, or why there are none.
            calm: whether a merge may be published: not while the loss is an outlier.
        """
        self._wait_for_the_last(snapshot.step)
        model, captured = self._capture(live, snapshot.step)
        report = _Report(self.host.log_step, phase, snapshot)
        self._pending = self.background.submit(partial(self._keep, model, captured, report, calm))

    def wait_until_merged(self) -> None:
        """Waits until the last snapshot is in the window, measured and merged; all ranks do so together."""
        if self._pending is None or self.background.is_current:
            return
        self._pending.wait()
        self._pending = None
        self.log_news()
        self.host.expose(self._logged)
        self._logged = {}

    def log_news(self) -> None:
        """Tells the loggers of the snapshots that are in the window by now; each rank when it has them."""
        while self._reports:
            self._log(self._reports.pop(0))

    def wait(self) -> None:
        """Waits until all is written, for some minutes at most: other ranks may be gone."""
        self.background.drain(_PATIENCE)

    def finish_what_is_begun(self) -> None:
        """Waits until the last snapshot is in the window and all that was handed in is published."""
        self.background.drain()
        self.wait_until_merged()

    def current_merge(self, model: ModelTensors) -> Merge | None:
        """The merge of the window as it is; ``None`` where there is none, or it can't be made."""
        self.wait_until_merged()
        try:
            self._warn_of_cuts()
            return self._without_altered(partial(self._agreed_merge, model))
        except Exception:
            log.exception("merge: the window could not be merged; training goes on")
            return None

    def newest_emission_up_to(self, step: int) -> Path | str | None:
        """The newest published merge that holds no snapshot after a step."""
        self.wait()
        return self._window.ranks.from_first(self.publisher.newest_up_to(step))

    def finish(self, model: ModelTensors, step: int) -> None:
        """Publishes the last merge of the run, unless it is published already."""
        self.finish_what_is_begun()
        self._handed_in = self._window.ranks.from_first(self._emitted)  # it alone knows what could be written
        self.background.submit(partial(self._emit, model))  # what fails there is logged
        self.background.drain()
        if not self.publisher.published:
            warn(f"merge: nothing was published: {self._why_nothing(step)}")

    def _why_nothing(self, step: int) -> str:
        """Why there is no merge after so many optimizer steps, and what to do."""
        options, snapshots = self.options, self._window.snapshots
        shorter = f"choose a shorter interval than every_n_{options.unit}={options.every}"
        if not snapshots:
            failed = f"{step} steps gave no snapshot that was kept"
            return f"{failed}; {shorter}, if no warning above says more"
        count = f"{len(snapshots)} snapshot{'s' * (len(snapshots) > 1)} in {step} steps"
        if all(snapshot.phase == "warmup" for snapshot in snapshots):
            return f"{count}, of the warm-up only, which is never merged; train on, or {shorter}"
        if not self._window.segment():
            phases = ", ".join(sorted({snapshot.phase for snapshot in snapshots}))
            return f"{count} ({phases}), and a merge takes two of one phase after the warm-up; {shorter}"
        return f"{count}, whose merge could not be made or written; see the warnings above"

    def close(self) -> None:
        """Gives the emissions' process group back. All ranks have to."""
        self.publish_group.close()

    def state_dict(self, to_keep: bool = True) -> dict[str, Any]:
        """What a resumed run needs, as primitives; ``to_keep`` is a window's.

        A checkpoint waits until the last snapshot is in the window, and not until its merge is published.
        """
        if self._pending is not None and not self.background.is_current:
            self._pending.wait(_PATIENCE)
        try:
            self.log_news()
        except Exception:  # a checkpoint is worth more than a curve
            log.exception("merge: a snapshot could not be logged")
        return {
            "run_id": self._window.folder.run_id,
            "taken": self._taken,
            "handed_in": self._handed_in,
            "published": list(self.publisher.published),
            "advised": list(self._advised),
            "window": self._window.state_dict(to_keep),
            "first_diversity": self._merger.first_rms,
            "diversity": self._merger.diversity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``, except for the window."""
        self._taken = state["taken"]
        self._advised = list(state["advised"])
        self._merger.first_rms, self._merger.diversity = state["first_diversity"], state["diversity"]
        self.publisher.resume(state["published"], state["run_id"], state.get("handed_in", -1))
        self._emitted = self._handed_in = self._window.ranks.from_first(self.publisher.newest_step)

    def publish_again(self, model: ModelTensors, state: Mapping[str, Any]) -> None:
        """Publishes what was not, when the run ended whose window was restored."""
        last = state.get("handed_in", -1)
        if last > self._emitted and self._window.segment() and self._window.segment()[-1].step == last:
            self.background.submit(partial(self._emit, model)).wait()

    def _capture(self, live: ModelTensors | Exception, step: int) -> tuple[ModelTensors, Captured]:
        """A copy of the live weights, or why there is none: the other ranks have to be told."""
        if isinstance(live, Exception):
            return ModelTensors(), Captured(error=live)
        with evaluated_weights(self.host.optimizers):
            return live, self._window.capture(live.tensors, live.frozen, step)

    def _wait_for_the_last(self, step: int) -> None:
        waited = -time.monotonic()
        self.wait_until_merged()
        waited += time.monotonic()
        if waited > _NOTICEABLE and not self._told_to_wait:
            self._told_to_wait = True
            warn(
                f"merge: the run waited {waited:.1f} s at step {step} until the snapshot before was kept: "
                "storage is slower than the interval; choose a longer one, or a faster dirpath"
            )

    # In the background, one job after the other.

    def _keep(self, model: ModelTensors, captured: Captured, report: _Report, calm: bool) -> None:
        """Takes a captured snapshot into the window, then measures, merges and publishes.

        What fails here is logged; the run goes on.
        """
        try:
            self._take_in(model, captured, report, calm)
        except Exception:
            log.exception("merge: the snapshot of step %s failed; training goes on", report.snapshot.step)

    def _take_in(self, model: ModelTensors, captured: Captured, report: _Report, calm: bool) -> None:
        self._warn_of_cuts()  # first: a difference is one to what the window holds
        if not self._append(report.snapshot, captured):
            return
        self._taken += 1
        emit = calm and self.options.emit_every > 0 and self._taken % self.options.emit_every == 0
        evaluate = self.options.evaluate and self.host.will_validate
        self._without_altered(partial(self._merger.measure, model, merge=emit or evaluate))
        if emit:
            self._emit(model)
        report.window, report.diversity = len(self._window), self._merger.diversity
        self._reports.append(report)

    def _append(self, snapshot: Snapshot, captured: Captured) -> bool:
        """Says whether the window took a captured snapshot."""
        try:
            self._window.add(snapshot, captured)
        except (ValueError, RuntimeError, MemoryError) as error:  # not finite, a changed model, no memory
            warn(f"merge: no snapshot at step {snapshot.step}: {error}")
        except OSError as error:
            warn(f"merge: the snapshot of step {snapshot.step} could not be kept in a file ({error})")
        return bool(self._window.snapshots) and self._window.snapshots[-1] is snapshot

    def _emit(self, model: ModelTensors) -> None:
        """Has the merge of the window as it is published, if there is something new."""
        merge = self.current_merge(model)
        if merge is not None and merge.step != self._handed_in:
            self._handed_in = merge.step
            prepared = self._prepared(merge, model.tied)
            merge.published = self.background.submit(partial(self._publish, merge.step, prepared))

    def _prepared(self, merge: Merge, tied: Mapping[str, str]) -> Callable[[], object] | Exception:
        """What publishes a merge, or why this rank can't."""
        try:
            return self._exporter.prepare(
                merge,
                tied,
                diversity=self._merger.diversity,
                layout=self._window.store.whole.hash,
                run_id=self._window.folder.run_id,
            )
        except Exception as error:  # the other ranks have to be told
            return error

    def _publish(self, step: int, prepared: Callable[[], object] | Exception) -> None:
        try:
            self.publish_group.agree(prepared if isinstance(prepared, Exception) else None)
            if not isinstance(prepared, Exception):
                prepared()
            self._emitted = step
        except Exception as error:
            warn(f"merge: the merge of step {step} was not published ({error!r}); training goes on")

    def _warn_of_cuts(self) -> None:
        for line in self._window.drop_cut():
            warn(f"merge: left out of the window: {line}")

    def _agreed_merge(self, model: ModelTensors) -> Merge | None:
        """The merge of the window as it is, if every rank could make its part of it.

        Raises:
            Exception: what one of them could not.
        """
        merge: Merge | None = None
        problem: Exception | None = None
        try:
            merge = self._merger.current(model)
        except Exception as error:
            problem = error
        try:
            self._window.ranks.agree(problem)
        except Exception:
            self._merger.forget()  # on the ranks that could, too
            raise
        return merge

    def _without_altered(self, merge: Callable[[], _T]) -> _T:
        """Merges; where what comes out is not finite, once more without the snapshots whose files changed.

        Args:
            merge: raises on all ranks where it does on one.
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

    def _log(self, report: _Report) -> None:
        snapshot, diversity = report.snapshot, report.diversity
        metrics: dict[str, float] = {
            "merge/phase": report.phase.code,
            "merge/lr_ratio": snapshot.lr_ratio,
            "merge/window": report.window,
        }
        if snapshot.tokens is not None:
            metrics["merge/tokens"] = snapshot.tokens
        if diversity is not None:
            metrics["merge/diversity_rms"] = diversity["rms"]
            metrics["merge/diversity_change"] = diversity["change_percent"]
        self.host.log(metrics, report.logged_step)
        self._logged |= metrics
        change = diversity["change_percent"] if diversity else None
        if line := advice(report.phase, snapshot.since, change, self._advised):
            info(line)
