"""The merging of one run: its parts, wired to a live training loop, and their state."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from shlex import quote
from typing import Any, SupportsFloat

from torch import Tensor
from torch.optim import Optimizer

from merge_callback.engine.background import Background
from merge_callback.engine.candidates import Evaluate, Lower, Scores
from merge_callback.engine.comparison import Comparison
from merge_callback.engine.expert_merge import ExpertMerge
from merge_callback.engine.model_parts import (
    check_exclude,
    entries_beside,
    shapes_of,
    tensor_changes,
)
from merge_callback.engine.plan import Plan, from_here
from merge_callback.engine.progress import UNSEEN, Progress
from merge_callback.engine.run_folder import RunFolder
from merge_callback.engine.run_window import (
    new_window,
    note_publishing,
    restore_window,
    running_averages,
)
from merge_callback.engine.session_parts import event_file, publisher_of, watch_for_spikes
from merge_callback.engine.snapshot_pipeline import SnapshotPipeline
from merge_callback.engine.validations import Scored
from merge_callback.merging.power_iteration import vectors_of
from merge_callback.messages import info, tell, warn
from merge_callback.metrics import GAIN
from merge_callback.options import Options
from merge_callback.publish.export import Naming
from merge_callback.sharding import Ranks, Sharding
from merge_callback.signals.host import Host, report
from merge_callback.snapshots.capture import LiveModel, ModelTensors
from merge_callback.snapshots.merge import Merge
from merge_callback.snapshots.unfit import check_unfit
from merge_callback.snapshots.window import Window
from merge_callback.snapshots.window_merger import WindowMerger

log = logging.getLogger(__name__)

_PATIENCE = 600.0  # seconds that uploads may take after an exception
_LAST_UPLOADS = 1500.0  # same at the end of a run with several ranks; the others give up after half an hour

_IF_IT_KEEPS_CHANGING = (
    ". If a buffer keeps changing its shape, leave it out with register_buffer(persistent=False)"
)


class MergeSession:
    """The merging of one run, for any training loop.

    Args:
        options: the options of merging.
        host: the run, whose model is set up, moved and restored.
        resume: a former session's ``state_dict``; empty for a new run.
        folder: the run's locked folder; the caller gives it up if this raises.

    Raises:
        ValueError: if an option does not fit this model, trainer or machine.
    """

    def __init__(
        self,
        options: Options,
        host: Host,
        resume: Mapping[str, Any],
        folder: RunFolder,
    ) -> None:
        self.host, self.ranks = host, Ranks.of_run()
        self.folder, self.dirpath, self.lock = folder, folder.path, folder.lock
        naming = Naming.of(host.module, options.strip_prefix, host.further_files)
        model = self.live()
        self.options = options
        self._at_snapshots = LiveModel(host.module, host.root)
        self._model: ModelTensors | Exception = model  # as of the newest snapshot
        self._averaged: Mapping[str, Tensor] | None = None  # since the newest snapshot
        check_exclude(options.exclude, model)
        for line in (check_unfit(model.unfit, options.exclude), entries_beside(host.module, model)):
            if line:
                info(line)
        if self.ranks.size > 1 and (vectors := vectors_of(model.tensors)):
            info(
                f"merge: in merges of several ranks, spectral norm's vectors ({min(vectors)}, …) are "
                "the newest snapshot's; a forward pass in training mode fits them to the merged weights"
            )
        self.sharding = Sharding(model.tensors, model.pieces, model.buffers, self.ranks, model.frozen)
        self._shapes = shapes_of(model)
        self.progress = Progress(options, host, self.ranks, model.names, self.sharding)
        window = new_window(options, model, self.sharding, folder, resume)
        note_publishing(window, naming, model, options.exclude)
        self.running = running_averages(options, model, window, host.device)
        publisher = publisher_of(options, folder, self.ranks)
        self.pipeline = SnapshotPipeline(options, host, window, publisher, naming, self.running)
        host.spare = window.store.live.spare
        self.experts = ExpertMerge.of(options, model, naming, self.sharding, window.store.layout)
        self.spikes = watch_for_spikes(options, host, self.pipeline, self.progress.statistics, folder.path)
        if self.spikes and self.running:
            self.spikes.policy.after_restore = self._roll_averages_back
        try:
            self._put_folder_in_order()
            plan = Plan.of(options, window.store, host, self.running)
            tell([*plan.lines(), *folder.notices], plan.warnings())
            if self.ranks.is_first:
                host.record = event_file(options, plan, folder, self.ranks, window).write
            if resume:
                self._load_state_dict(resume)
            self._record_phase()
            self.progress.begin(plan)
        except BaseException:
            self._let_go()
            self._give_folder_back(_PATIENCE)
            raise

    def live(self) -> ModelTensors:
        """The live model's tensors on this rank."""
        return ModelTensors.of(self.host.module, self.host.root)

    @property
    def window(self) -> Window:
        """The window, once the last snapshot is in it."""
        return self.pipeline.window

    @property
    def merger(self) -> WindowMerger:
        """The window's merger, once it has processed the last snapshot."""
        return self.pipeline.merger

    @property
    def background(self) -> Background:
        """The background thread that processes snapshots."""
        return self.pipeline.background

    @property
    def is_half_restored(self) -> bool:
        """Whether a restore failed half way, so that the weights are a mixture."""
        return self.spikes is not None and self.spikes.policy.is_half_restored

    @classmethod
    def begin(cls, options: Options, host: Host, resume: Mapping[str, Any]) -> MergeSession:
        """A session in the run's own folder, which is found and locked first.

        Args:
            options: the options of merging.
            host: the run, whose model is set up, moved and restored.
            resume: a former session's ``state_dict``; empty for a new run.

        Raises:
            ValueError: if an option does not fit this model, host or machine.
        """
        folder = RunFolder.take(options, host, resume)
        try:
            return cls(options, host, resume, folder)
        except BaseException:
            folder.give_up()
            raise

    def begin_batch(self, batch: Any, batch_idx: int, tokens: int | Tensor | None = None) -> None:
        """Notes a batch before it is trained on; with the first one, finds out whether tokens can be counted.

        Args:
            batch: a batch of any kind; ``None`` if the loop does not show it.
            batch_idx: its index in the epoch.
            tokens: its number of tokens; ``None`` to have them counted.

        Raises:
            ValueError: if they can't be counted and the interval is in tokens.
            RemoteError: if another rank raises.
        """
        if self.spikes:
            self.spikes.begin_batch(batch, batch_idx)
        if self.progress.clock.countable is None:
            self.progress.begin_batch(batch, tokens)

    def note_step(self, optimizer: Optimizer) -> None:
        """Notes the learning rates and gradients of the optimizer step that is about to be taken."""
        self.progress.applied.note(optimizer)
        if self.running:
            self.running.wait()  # they may still be reading what the step overwrites
        if self.spikes:
            self.spikes.note_step(optimizer)

    def lr_factor(self, step: int) -> float:
        """The factor on the learning rates after ``step`` optimizer steps; 1 if there was no restore."""
        return self.spikes.policy.recovery.lr.factor(step) if self.spikes else 1.0

    def end_batch(
        self, outputs: Any, divided_by: int = 1, batch: Any = None, tokens: int | Tensor | None = None
    ) -> bool:
        """Counts a batch and, if an optimizer step was taken with it, the step; restores after a spike.

        Args:
            outputs: the loss: a tensor, a float, or a mapping with a ``"loss"``; ``None`` if there is none.
            divided_by: what the loop has divided the loss by, to accumulate gradients.
            batch: the batch whose tokens are counted.
            tokens: its number of tokens; ``None`` to have them counted.

        Returns:
            Whether a snapshot is due. Never right after a restore: those weights are a merge.

        Raises:
            TrainingDivergedError: if the run is to stop after a spike.
        """
        progress = self.progress
        if progress.clock.countable is not False:
            progress.count(batch, tokens)
        if self.spikes and progress.stepless < UNSEEN:
            progress.statistics.add_loss(outputs, divided_by)
        self.pipeline.log_pending()
        if not progress.end_batch():
            return False
        step = progress.step
        if progress.enters_segment():
            self._begin_segment()
        if self.spikes:
            self.spikes.note_end_of_step(step)
        seen, is_due = progress.end_step(self.spikes.loss_scale if self.spikes else None)
        restored = self.spikes is not None and self.spikes.end_step(step, progress.phases.warmup, seen)
        if self.running and not restored and self.running.is_due(step):
            self._update_averages()
        return is_due and not restored

    def _update_averages(self) -> None:
        assert self.running is not None
        try:
            if self._averaged is None:  # whether the model has other tensors is found out at each snapshot
                self._averaged = self._at_snapshots.tensors().tensors
            self.running.update(self.progress.step, self._averaged)
        except Exception:
            log.exception("merge: the running averages end at step %s; training goes on", self.progress.step)
            self.running.end()

    def _roll_averages_back(self, step: int) -> None:
        assert self.running is not None
        try:
            self.running.roll_back(step, self.host.step, self.live().tensors)
        except Exception:
            log.exception("merge: the running averages end at step %s; training goes on", self.host.step)
            self.running.end()

    def follow_model(self) -> MergeSession | None:
        """The session to continue with; call it before a snapshot. A new one if the model's tensors changed.

        A merge needs the same tensors in all snapshots, so changed tensors get a new session with a new
        window. ``None`` if that can't be made; nothing more is merged then.
        """
        self._averaged = None
        try:
            before, self._model = self._model, self._at_snapshots.tensors()
            change = "" if self._model is before else tensor_changes(self._shapes, self._model)
        except Exception as error:  # reported when the snapshot fails because of it
            self._model, change = error, ""
        if self.ranks.size > 1:
            self.pipeline.wait_until_merged()  # before that, only it may communicate with other ranks
        change = next(filter(None, self.ranks.exchange(change)), "")
        if not change:
            return self
        hint = _IF_IT_KEEPS_CHANGING if " changed " in f" {change}" else ""
        warn(
            "merge: the model's tensors have changed since training began: "
            f"at step {self.progress.step} {change}. A new window begins here{hint}"
        )
        try:
            return MergeSession(self.options, self.host, self._hand_over(), self.folder)
        except Exception:
            log.exception("merge: nothing more is merged: no window fits the changed model; training goes on")
            self.folder.give_up()
            return None

    def _hand_over(self) -> dict[str, Any]:
        """Ends this session but keeps its folder; returns the next one's state, with an empty window."""
        self.pipeline.finish_what_is_begun()
        state = self.state_dict()
        self._let_go()
        for shared in (self.pipeline, self.sharding, self.ranks):
            shared.close()
        return {**state, "window": {**state["window"], "snapshots": [], "moved": []}}

    def take_snapshot(self) -> None:
        """Copies the live weights; the copy is processed in the background."""
        snapshot = self.progress.snapshot(self.lr_factor(self.progress.step - 1))
        is_within_baseline = self.spikes is None or self.spikes.is_within_baseline
        self.pipeline.take(snapshot, self.progress.phases.phase, self._model, is_within_baseline)

    def note_validation(self, live: Mapping[str, SupportsFloat], scored: Scored | None = None) -> None:
        """Logs and keeps what a validation has found; all ranks call it.

        Args:
            live: what the live weights score, by metric.
            scored: what a merge scores, if one was validated with them.
        """
        logged, found = dict[str, float](), dict[str, float]()
        if scored is not None:
            found = self.pipeline.note_validation(live, scored)
            logged = {**scored.shown, **found, **scored.numbers}
            report(self.host, logged)
        phase = self.progress.phases.phase.value
        at = {"step": self.host.step, "tokens": self.progress.tokens, "phase": phase}
        lower = scored.lower if scored else {}
        merge_step = self.pipeline.keep_validation(scored, at, live, logged, lower)
        others = scored.compared.entries if scored and scored.compared else ()
        self.host.record(
            "validation",
            self.host.step,
            scores={
                "live": live,
                **({"merged": scored.metrics} if scored else {}),
                **{entry.name: entry.metrics for entry in others},
            },
            gains={name.removeprefix(GAIN): v for name, v in found.items() if name.startswith(GAIN)},
            merge=merge_step,
            seconds=scored.seconds if scored else None,
            candidates=scored.compared.record() if scored and scored.compared else None,
        )

    def compare(self, default: Merge, evaluate: Evaluate, live: Scores, lower: Lower) -> Comparison | None:
        """Validates all candidates; ``None`` if no validation succeeded. All ranks have to call this.

        Args:
            default: the present merge by the default method.
            evaluate: validates one.
            live: what the live weights score, by metric.
            lower: tells whether lower is better.
        """
        return self.pipeline.compare(self.live(), default, evaluate, live, lower)

    def candidate(self, name: str) -> Merge | None:
        """The present merge that has a name; ``None`` if this model has none. All ranks have to call this.

        Raises:
            ValueError: for a name that no candidate has.
        """
        default = self.current_merge()
        if default is None or name == default.name:
            return default
        if name not in (names := self.pipeline.candidates.names):
            raise ValueError(
                f"no candidate is called {name!r}; there are {', '.join([default.name, *names])}"
            )
        return self.pipeline.candidates.merge(self.live(), name)

    def current_merge(self, merger: WindowMerger | None = None) -> Merge | None:
        """The merge of the present window; ``None`` if this model has none. All ranks have to call this.

        Args:
            merger: another merger of the window than the one whose merges are published.
        """
        model = self.live()
        if self.running:
            self.running.wait()  # whoever asks may put the merge in the place of what they read
        self.pipeline.wait_until_merged()  # before that, only it may communicate with other ranks
        is_same = all(self.ranks.exchange(not tensor_changes(self._shapes, model)))
        return self.pipeline.current_merge(model, merger) if is_same else None

    def finish(self) -> None:
        """Publishes the last merge of the run, unless it is published already."""
        model = self.live()
        if change := tensor_changes(self._shapes, model):
            warn(f"merge: the last merge is of the model before its tensors changed: {change}")
        self.pipeline.finish(model, self.progress.step)
        self._let_go()
        self.host.record("end", self.progress.step, finished=True)
        info(f"merge: for a page of this run: merge-callback report {quote(str(from_here(self.dirpath)))}")
        for shared in (self.pipeline, self.sharding, self.ranks):
            shared.close()
        self._give_folder_back(None if self.ranks.size == 1 else _LAST_UPLOADS)

    def close(self) -> None:
        """Releases the folder and the learning rates, and stops waiting for the other ranks."""
        self.pipeline.publish_held()
        self._let_go()
        self.host.record("end", self.progress.step, finished=False)
        self._give_folder_back(_PATIENCE)

    def _let_go(self) -> None:
        self.pipeline.wait()
        self.host.spare = None
        self.progress.statistics.close()
        if self.spikes:
            self.spikes.close()

    def _give_folder_back(self, patience: float | None) -> None:
        """Unlocks the folder once all uploads are done, or after ``patience`` seconds."""
        self.pipeline.publisher.finish_uploads(patience)
        if self.lock:
            self.lock.close()

    def state_dict(self, to_keep: bool = True) -> dict[str, Any]:
        """Everything a resumed run needs, as primitives; the weights stay in the window's files.

        Args:
            to_keep: whether it is saved in a checkpoint, which needs these files from now on.
        """
        kept = self.pipeline.state_dict(to_keep)
        return {
            "dirpath": str(self.dirpath),
            "remote": self.folder.url,
            **self.progress.state_dict(),
            **kept,
            "spikes": self.spikes.state_dict() if self.spikes else None,
            **({"experts": self.experts.state_dict()} if self.experts else {}),
        }

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.progress.load_state_dict(state)
        self.pipeline.load_state_dict(state)
        if restore_window(self.window, self.folder, state, self.host.step):
            self._report_resume()
        if self.running:
            for line in self.running.load_state_dict(
                state.get("running", {}), state["window"]["folder"], self.host.step
            ):
                warn(f"merge: {line}")
        self.host.record(
            "resumed",
            self.progress.step,
            tokens=self.progress.clock.tokens or None,
            snapshots=[snapshot.step for snapshot in self.window.snapshots],
        )
        self.pipeline.publish_again(self.live(), state)
        if self.experts and "experts" in state:
            self.experts.load_state_dict(state["experts"])
        if self.spikes and state.get("spikes"):
            if "numbers" not in state["spikes"]:
                warn("merge: the checkpoint is from an older version, so spike detection starts from scratch")
                return
            self.spikes.load_state_dict(state["spikes"])

    def _report_resume(self) -> None:
        steps = ", ".join(str(snapshot.step) for snapshot in self.window.snapshots) or "none"
        progress, phases = self.progress, self.progress.phases
        tokens = f", {progress.clock.tokens:,} tokens seen" if progress.clock.tokens else ""
        info(
            f"merge: resumed at step {progress.step:,}{tokens}: the snapshots of steps {steps} are back, "
            f"{self.pipeline.emissions.count} merges were published, the learning rate is in its "
            f"{phases.phase.value} phase since step {phases.since:,}"
        )

    def _put_folder_in_order(self) -> None:
        """Prepares the folder for this run: the first rank does so for all.

        Raises:
            OSError: if it can't be written.
        """
        problem: Exception | None = None
        try:
            if self.lock is not None:
                self.lock.claim = self.window.folder.claim
                self.lock.claim()
                self.pipeline.publisher.sweep()
                for writer in (self.window.store.files, self.window.folder, self.pipeline.publisher):
                    writer.before_writing = self.lock.check
                if self.spikes:
                    self.spikes.policy.before_writing = self.lock.check
        except Exception as error:
            problem = error
        self.ranks.agree(problem)

    def _begin_segment(self) -> None:
        """Notes that the learning rate has begun another segment, perhaps some steps ago."""
        phases = self.progress.phases
        self.window.relabel(phases.phase.value, phases.since)
        self.merger.forget()
        self._record_phase()

    def _record_phase(self) -> None:
        phase = self.progress.phases.phase.value
        self.host.record("phase", self.progress.step, phase=phase, since=self.progress.phase_since)


def beside_others(options: Options, callbacks: Iterable[object]) -> Options:
    """Of several callbacks only the first one restores the run; the others only report its spikes."""
    sessions = [getattr(callback, "session", None) for callback in callbacks]
    actions = [s.options.spike.action for s in sessions if isinstance(s, MergeSession)]
    if options.spike.action != "restore" or "restore" not in actions:
        return options
    return replace(options, spike=replace(options.spike, action="warn"))
