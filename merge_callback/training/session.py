"""One fit's merging: the parts, wired to a live trainer, and their state."""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from merge_callback.options import Options
from merge_callback.publish import Publisher
from merge_callback.publish.export import Naming, prepare_emission
from merge_callback.sharding import Ranks, Sharding, local
from merge_callback.snapshots.arena import Arena, all_finite
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.folder_lock import holder, lock_folder
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.merge import Merge, WindowMerger
from merge_callback.snapshots.storage import Snapshot, SnapshotStore
from merge_callback.snapshots.window import Window
from merge_callback.training.applied_lr import AppliedLR
from merge_callback.training.background import Background
from merge_callback.training.evaluation import MergedValidation
from merge_callback.training.interval import Interval
from merge_callback.training.lr_phase import LRPhaseDetector, Phase
from merge_callback.training.plan import Plan, total_steps
from merge_callback.training.reporting import advice, log_metrics, logged_step
from merge_callback.training.spike_watch import SpikeWatch
from merge_callback.training.step_statistics import StepStatistics, counts_batches, step_progress
from merge_callback.training.token_clock import TokenClock

log = logging.getLogger(__name__)

_PATIENCE = (
    600.0  # seconds that a snapshot and a merge may take to be written, once a checkpoint waits for them
)

_NOTICEABLE = 1.0  # seconds of waiting that the user is told of

_MEASURED_OVER = 3  # optimizer steps after which the tokens of a step are reported


@dataclass
class _Report:
    """What is logged of a snapshot, and at which step."""

    logged_step: int
    phase: Phase
    snapshot: Snapshot
    window: int = 0
    diversity: dict[str, Any] | None = None


class MergeSession:
    """The merging of one fit.

    Args:
        options: the callback's.
        trainer: whose model is set up, moved and restored.
        module: the live model.
        resume: a former session's ``state_dict``; empty for a new run.

    Raises:
        ValueError: where an option does not fit this model, trainer or machine.
    """

    def __init__(
        self, options: Options, trainer: Trainer, module: LightningModule, resume: Mapping[str, Any]
    ) -> None:
        self.options, self.trainer, self.module = options, trainer, module
        self.ranks = Ranks.of_run()
        self.dirpath = options.dirpath or Path(resume.get("dirpath") or _default_dirpath(trainer))
        self.naming = Naming.of(module, options.strip_prefix)
        self.publisher = Publisher(self.dirpath, options.keep_last, options.max_shard_bytes)
        model = self.live()
        _check_exclude(options.exclude, model)
        self.sharding = Sharding(model.tensors, model.pieces, model.buffers, self.ranks)
        self._names = model.names
        self.clock = TokenClock(options.count_tokens)
        self.statistics = StepStatistics(
            self.ranks, counts_batches(trainer), trainer.strategy.root_device, self.clock, self._own_gradient
        )
        self.applied = AppliedLR(trainer.optimizers, self._whole_numel)
        self.phases = LRPhaseDetector(total_steps(trainer))
        still, codec = _kept_as_they_are(options, model, resume.get("window", {}))
        layout = Layout.of(self.sharding.own(model.tensors), options.snapshot_dtype, still)
        whole = Layout.of(_whole(model), options.snapshot_dtype, still)
        folder = self.dirpath / "window" if options.durable else None
        masks = {name for name in model.buffers if not all_finite(model.tensors[name])}
        store = SnapshotStore(
            layout,
            options.storage,
            folder,
            module.device,
            masks,
            self.sharding,
            whole,
            codec=codec,
        )
        run_id = resume.get("run_id") or self.ranks.from_first(uuid.uuid4().hex)
        self._window = Window(options.window, store, run_id)
        lag = max(1, min(options.diversity_lag, options.window - 1))
        self.background, self.courier = Background(trainer.strategy.root_device), Ranks.of_run()
        self._merger = WindowMerger(
            self._window, options.methods, lag, options.exclude, self.background.drain
        )
        self._pending: threading.Event | None = None  # set when the last snapshot is in the window
        self._reports: list[_Report] = []
        self._told_to_wait = False
        self.step = trainer.global_step  # the last optimizer step seen
        self._progress = step_progress(trainer)
        self.interval = Interval(options.every, options.unit, self.clock, self.statistics, self.step)
        self.validation = MergedValidation(trainer, module, self.sharding)
        self.spikes = self._watch_for_spikes()
        self.taken = 0
        self.emitted_step = self._handed_in = -1  # what is published; what was to be, which all ranks know
        self.advised: list[str] = []
        self.lock: IO[str] | None = None
        try:
            self._take_folder()
            self.plan = Plan.of(options, store, trainer)
            _tell(self.plan.lines(), self.plan.warnings())
            if resume:
                self._load_state_dict(resume)
        except BaseException:
            self.close()
            raise
        self._first = (self.step, self.clock.tokens)

    def live(self) -> ModelTensors:
        """The live model's tensors, as they are on this rank."""
        return ModelTensors.of(self.module, self.trainer.strategy.model)

    @property
    def window(self) -> Window:
        """The window, once the last snapshot is in it."""
        self.settle()
        return self._window

    @property
    def merger(self) -> WindowMerger:
        """The window's merger, once it has done with the last snapshot."""
        self.settle()
        return self._merger

    @property
    def countable(self) -> bool | None:
        """Whether tokens can be counted; ``None`` before the first batch."""
        return self.clock.countable

    def check_countable(self, batch: Any) -> None:
        """Finds out, on the first batch, whether tokens can be counted, by all ranks.

        Raises:
            ValueError: where they can't and the interval is in tokens.
            RemoteError: where another rank raises.
        """
        if self.clock.countable is None and batch is not None:
            error = _failure(self.clock.count, batch)
            bearable = isinstance(error, ValueError) and self.options.unit == "steps"
            self.ranks.agree(None if bearable else error)
            self.clock.countable = all(self.ranks.exchange(error is None))

    def note_step(self, optimizer: Optimizer) -> None:
        """Notes the learning rates and gradients of the optimizer step that comes now."""
        self.applied.note(optimizer)
        if self.spikes and self.spikes.grad_norm:
            self.spikes.note_gradients(optimizer)

    def lr_factor(self, step: int) -> float:
        """What the rates of the update after ``step`` optimizer steps are scaled by, since a restore."""
        return self.spikes.recovery.lr.factor(step) if self.spikes else 1.0

    def end_batch(self, outputs: Any, batch: Any) -> bool:
        """Counts a batch and, where an optimizer step was taken with it, the step; restores after a spike.

        Returns:
            Whether a snapshot is due. Of weights that were just restored none is: they are a merge.

        Raises:
            TrainingDivergedError: where the run is to stop after a spike.
        """
        if self.clock.countable is not False:
            self._count(batch)
        if self.spikes:
            self.spikes.add_batch(outputs)
        if self._pending and self._pending.is_set():
            self.settle()
        step = self._progress.completed
        if step == self.step:
            return False  # gradients are being accumulated
        self.step = step
        self._observe_learning_rates()
        seen = self.statistics.end_step(self.step, self.spikes.loss_scale if self.spikes else None)
        if step - self._first[0] == _MEASURED_OVER:
            self._report_tokens_per_step()
        due = self.interval.is_over(self.step)
        warming_up = self.phases.is_warming_up
        restored = self.spikes is not None and self.spikes.end_step(self.step, warming_up, seen)
        return due and not restored

    def note_random_state(self) -> None:
        """Remembers, before a validation, where the random generators stand."""
        if self.options.evaluate:
            self.validation.note_random_state()

    def take_snapshot(self) -> None:
        """Copies the live weights; what becomes of the copy, training does not wait for.

        Unless the snapshot before is not written yet: then storage is slower than the interval, and the run
        waits for it rather than skip a snapshot or take up ever more memory.
        """
        self._wait_for_the_last_snapshot()
        model, captured = self._captured()
        snapshot = Snapshot(
            step=self.step,
            tokens=self.clock.tokens if self.countable else None,
            lr=max(self.applied.rates, default=0.0) * self.lr_factor(self.step - 1),
            lr_ratio=self.phases.lr_ratio,
            phase=self.phases.phase.value,
            since=self.phases.since,
            lr_step=self.phases.steps,
        )
        calm = self.spikes is None or self.spikes.calm
        report = _Report(logged_step(self.trainer), self.phases.phase, snapshot)
        self._pending = self.background.submit(partial(self._keep, model, captured, report, calm))

    def settle(self, timeout: float | None = None) -> None:
        """Waits until the last snapshot is in the window, measured and merged, and logs it."""
        if self._pending is None or self.background.is_current or not self._pending.wait(timeout):
            return
        self._pending = None
        while self._reports:
            self._log_snapshot(self._reports.pop(0))

    def _keep(self, model: ModelTensors, captured: Arena | Exception, report: _Report, calm: bool) -> None:
        """Takes a captured snapshot into the window, then measures, merges and publishes.

        What fails here is logged; the run goes on.
        """
        try:
            self._take_in(model, captured, report, calm)
        except Exception:
            log.exception("merge: the snapshot of step %s failed; training goes on", report.snapshot.step)

    def _take_in(self, model: ModelTensors, captured: Arena | Exception, report: _Report, calm: bool) -> None:
        self._warn_of_damage()  # first: a difference is one to what the window holds
        if not self._append(report.snapshot, captured):
            return
        self.taken += 1
        emit = calm and self.options.emit_every > 0 and self.taken % self.options.emit_every == 0
        evaluate = self.options.evaluate and self.trainer.enable_validation
        self._merger.measure(model, merge=emit or evaluate)
        if emit:
            self._emit(model)
        report.window, report.diversity = len(self._window), self._merger.diversity
        self._reports.append(report)

    def _emit(self, model: ModelTensors) -> None:
        """Publishes the merge of the window as it is, if there is something new, while training goes on."""
        merge = self._current_merge(model)
        if merge is not None and merge.step != self._handed_in:
            self._handed_in = merge.step
            publish = prepare_emission(
                self.publisher,
                merge,
                self.sharding,
                model.tied,
                self.naming,
                self.courier,
                self.options.format == "dcp",
                diversity=self._merger.diversity,
                layout=self._window.store.whole.hash,
                run_id=self._window.folder.run_id,
            )
            self.background.submit(partial(self._publish, merge.step, publish))

    def _publish(self, step: int, publish: Callable[[], object]) -> None:
        try:
            publish()
            self.emitted_step = step
        except Exception as error:
            rank_zero_warn(f"merge: the merge of step {step} was not published ({error!r}); training goes on")

    def evaluate(self) -> None:
        """Validates the merge of the window as it is, if that is new."""
        self.settle()
        self.validation.update(self._current_merge(self.live()))

    def finish(self) -> None:
        """Publishes the last merge of the run, unless it is published already."""
        self.background.drain()
        self.settle()
        self._handed_in = self.ranks.from_first(self.emitted_step)  # it alone knows what could be written
        self._emit(self.live())
        self.background.drain()
        if not self.publisher.published:
            rank_zero_warn(
                f"merge: nothing was published: {len(self._window)} snapshots in {self.step} steps, and a "
                "merge takes two of one phase after the warm-up"
            )
        self.close()
        for shared in (self.courier, self.sharding, self.ranks):
            shared.close()

    def close(self) -> None:
        """Lets go of the folder, of the learning rates, and of what the other ranks still send."""
        self.background.drain(_PATIENCE)
        self.statistics.close()
        if self.spikes:
            self.spikes.close()
        if self.lock:
            self.lock.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as primitives; the weights stay in the window's files."""
        self.background.drain(_PATIENCE)  # a checkpoint counts on what was written before it
        self.settle(0)
        statistics = self.statistics.state_dict()  # first: it may advance the clock
        return {
            "dirpath": str(self.dirpath.absolute()),
            "run_id": self._window.folder.run_id,
            "tokens": self.clock.tokens,
            "step": self.step,
            "mark": self.interval.mark,
            "largest_step": self.clock.largest,
            "statistics": statistics,
            "taken": self.taken,
            "emitted_step": self.emitted_step,
            "validation": self.validation.state_dict(),
            "advised": list(self.advised),
            "published": list(self.publisher.published),
            "learning_rates": self.applied.state_dict(),
            "phases": self.phases.state_dict(),
            "window": self._window.state_dict(),
            "first_diversity": self._merger.metric.first,
            "diversity": self._merger.diversity,
            "spikes": self.spikes.state_dict() if self.spikes else None,
        }

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.interval.mark = state["step"], state["mark"]
        self.clock.tokens, self.clock.largest = state["tokens"], state["largest_step"]
        self.statistics.load_state_dict(state["statistics"])
        self.taken = state["taken"]
        self.emitted_step = self._handed_in = state["emitted_step"]
        self.advised = list(state["advised"])
        self.validation.load_state_dict(state["validation"])
        self.publisher.published = list(state["published"])
        self.applied.load_state_dict(state["learning_rates"])
        self.phases.load_state_dict(state["phases"])
        self._merger.metric.first, self._merger.diversity = state["first_diversity"], state["diversity"]
        self._restore_window(state["window"], Path(state["dirpath"]))
        if self.spikes and state.get("spikes"):
            self.spikes.load_state_dict(state["spikes"])

    def _restore_window(self, state: Mapping[str, Any], dirpath: Path) -> None:
        if different := self._window.layout_difference(state):
            if dirpath == self.dirpath.absolute():
                raise ValueError(
                    f"the run that is resumed kept a window of another model in dirpath={str(dirpath)!r}: "
                    f"{different}; resume with the model, precision, snapshot_dtype and snapshot_codec "
                    "it was kept with, or give a new dirpath to begin with an empty window"
                )
            rank_zero_warn(
                f"merge: the window begins empty, the resumed one is of another model: {different}"
            )
            return
        for problem in self._window.restore(state, self.trainer.global_step):
            rank_zero_warn(f"merge: left out of the restored window: {problem}")

    def _watch_for_spikes(self) -> SpikeWatch | None:
        options = self.options.spike
        if options.action == "off":
            return None
        return SpikeWatch(
            options,
            self.trainer,
            self.module,
            lambda: self.merger,
            self.statistics,
            self.dirpath,
            self._newest_emission_up_to,
        )

    def _own_gradient(self, parameter: Tensor) -> Tensor | None:
        """The part of a gradient that no other rank answers for."""
        gradient, name = parameter.grad, self._names.get(id(parameter))
        if gradient is None or name is None:
            return gradient
        if gradient.is_sparse:  # DDP's, so it is everybody's
            return gradient if self.ranks.is_first else None
        return self.sharding.own_part(name, local(gradient))

    def _whole_numel(self, parameter: Tensor) -> int:
        """A parameter's elements, on all ranks together."""
        name = self._names.get(id(parameter))
        return parameter.numel() if name is None else math.prod(self.sharding.wholes[name])

    def _newest_emission_up_to(self, step: int) -> Path | None:
        self.background.drain(_PATIENCE)
        return self.ranks.from_first(self.publisher.newest_up_to(step))

    def _take_folder(self) -> None:
        """Locks the run's folder and puts it in order: the first rank, for all of them.

        Raises:
            ValueError: where another run has it, it can't be written, or a rank does not see it.
        """
        problem: Exception | None = None
        session = self._window.store.session if self.ranks.size > 1 else ""
        try:
            if self.ranks.is_first:
                self.lock = lock_folder(self.dirpath, session)
                self._window.folder.claim()
                self.publisher.sweep()
        except Exception as error:
            problem = error
        self.ranks.agree(problem)
        if session and self.options.durable and holder(self.dirpath) != session:
            problem = ValueError(
                f"dirpath={str(self.dirpath)!r} is not the same folder on all ranks: rank {self.ranks.rank} "
                "does not see what rank 0 has written; name one on a file system that they share"
            )
        self.ranks.agree(problem)

    def _count(self, batch: Any) -> None:
        try:
            self.statistics.add_tokens(int(self.clock.count(batch)))
        except ValueError as error:
            self.statistics.add_tokens(0 if self.options.unit == "tokens" else math.nan)
            warn = rank_zero_warn if self.ranks.is_first else log.warning
            warn(f"merge: the tokens of the batch before step {self.step} are not counted: {error}")

    def _current_merge(self, model: ModelTensors) -> Merge | None:
        merge: Merge | None = None
        problem: Exception | None = None
        try:
            self._warn_of_damage()
            merge = self._merger.current(model)
        except Exception as error:
            problem = error
        try:
            self.ranks.agree(problem)
        except Exception:
            self._merger.forget()  # on the ranks that could, too
            log.exception("merge: the window could not be merged at step %s; training goes on", self.step)
            return None
        return merge

    def _warn_of_damage(self) -> None:
        for line in self._window.drop_damaged():
            rank_zero_warn(f"merge: left out of the window: {line}")

    def _observe_learning_rates(self) -> None:
        segment = self.phases.segment
        self.phases.observe([self.applied.total])
        if segment != self.phases.segment:
            self.window.relabel(self.phases.phase.value, self.phases.since)
            self.merger.forget()

    def _captured(self) -> tuple[ModelTensors, Arena | Exception]:
        """A copy of the live weights, or why there is none."""
        try:
            model = self.live()
        except Exception as error:  # the other ranks have to be told
            return ModelTensors(), error
        return model, self._window.capture(model.tensors)

    def _append(self, snapshot: Snapshot, captured: Arena | Exception) -> bool:
        """Says whether the window took a captured snapshot."""
        try:
            self._window.add(snapshot, captured)
        except (ValueError, RuntimeError, MemoryError) as error:  # not finite, a changed model, no memory
            rank_zero_warn(f"merge: no snapshot at step {snapshot.step}: {error}")
        except OSError as error:
            rank_zero_warn(
                f"merge: the snapshot of step {snapshot.step} could not be kept in a file ({error})"
            )
        return bool(self._window.snapshots) and self._window.snapshots[-1] is snapshot

    def _wait_for_the_last_snapshot(self) -> None:
        waited = -time.monotonic()
        self.settle()
        waited += time.monotonic()
        if waited > _NOTICEABLE and not self._told_to_wait:
            self._told_to_wait = True
            rank_zero_warn(
                f"merge: the run waited {waited:.1f} s at step {self.step} until the snapshot before was "
                "kept: storage is slower than the interval; choose a longer one, or a faster dirpath"
            )

    def _log_snapshot(self, report: _Report) -> None:
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
        log_metrics(self.trainer, metrics, report.logged_step)
        change = diversity["change_percent"] if diversity else None
        if line := advice(report.phase, snapshot.since, change, self.advised):
            rank_zero_info(line)

    def _report_tokens_per_step(self) -> None:
        if self.options.unit == "tokens":
            self.statistics.settle()
            per_step = (self.clock.tokens - self._first[1]) / _MEASURED_OVER
            _tell(self.plan.measured(per_step), self.plan.warnings(per_step))


def _default_dirpath(trainer: Trainer) -> Path:
    return Path(trainer.log_dir or trainer.default_root_dir) / "merges"


def _whole(model: ModelTensors) -> dict[str, Tensor]:
    """The model's tensors in their whole shapes, without values."""
    return {
        name: torch.empty(model.pieces[name].whole, dtype=tensor.dtype, device="meta")
        for name, tensor in model.tensors.items()
    }


def _kept_as_they_are(
    options: Options, model: ModelTensors, recorded: Mapping[str, Any]
) -> tuple[set[str], str]:
    """Names of what is stored natively where the rest is not, and the codec, where it has anything to do.

    These are the tensors that are never averaged, which rounding would change. What they were at the start of
    a run they stay when it is resumed, though something may have been frozen or unfrozen in between.

    Args:
        options: the callback's.
        model: the live one.
        recorded: the resumed window's ``state_dict``; empty for a new run.
    """
    tensors, dtype = _whole(model), options.snapshot_dtype
    still = model.frozen | model.buffers | model.matching(options.exclude)
    before = recorded.get("still", ())
    if (dtype or recorded.get("codec")) and Layout.of(tensors, dtype, before).hash == recorded.get("layout"):
        still = set(before)
    codec = options.snapshot_codec if Layout.of(tensors, dtype, still).delta.is_delta else ""
    return (still if dtype or codec else set()), codec


def _check_exclude(patterns: Sequence[str], model: ModelTensors) -> None:
    for pattern in patterns:
        if not model.matching([pattern]):
            raise ValueError(
                f"exclude={list(patterns)!r}: {pattern!r} matches no tensor of this model; "
                f"names look like {next(iter(model.tensors), None)!r}"
            )


def _failure(function: Callable[[Any], Any], argument: Any) -> Exception | None:
    try:
        function(argument)
    except Exception as error:
        return error
    return None


def _tell(lines: list[str], warnings: list[str]) -> None:
    for line in lines:
        rank_zero_info(line)
    for line in warnings:
        rank_zero_warn(line)
