"""From each step's loss to a decision, and from the decision to a restored run."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from merge_callback.snapshots.merge import WindowMerger
from merge_callback.snapshots.storage import Snapshot
from merge_callback.snapshots.window import Window
from merge_callback.spike_options import SpikeOptions
from merge_callback.training.recovery import Recovery
from merge_callback.training.reporting import log_metrics
from merge_callback.training.spike import SpikeDetector, SpikeEvent
from merge_callback.training.spike_record import RECORD, announce, append
from merge_callback.training.step_statistics import Statistics, StepStatistics

log = logging.getLogger(__name__)

_LOWER = 0.5
"""What the learning rate is multiplied by where older snapshots did not help."""


_UNMOVED = 20
"""In this fraction of a re-warm-up the weights are as they were restored, as far as the loss can tell."""


class TrainingDivergedError(RuntimeError):
    """The run keeps diverging, or diverged with nothing to restore; the message says what to try."""


@dataclass
class _Restores:
    """What was restored so far."""

    count: int = 0
    in_a_row: int = 0  # each within the cooldown of the one before
    step: int | None = None  # of the last one
    used: list[int] = field(default_factory=list)  # steps of its snapshots


class SpikeWatch:
    """Watches the loss of one fit, and restores the run after a spike.

    Args:
        options: what is a spike and what is done about it.
        trainer: in fit.
        module: its module.
        merger: gives the window's, once the last snapshot is in it.
        statistics: of the fit's steps; this notes their losses and gradients.
        dirpath: for the record of events.
        last_good_merge: finds the newest published merge that holds no snapshot after a step.

    Raises:
        ValueError: where an optimizer's state can't be set back.
    """

    def __init__(
        self,
        options: SpikeOptions,
        trainer: Trainer,
        module: LightningModule,
        merger: Callable[[], WindowMerger],
        statistics: StepStatistics,
        dirpath: Path,
        last_good_merge: Callable[[int], Path | None],
    ) -> None:
        self.options, self.trainer, self.module = options, trainer, module
        self._merger = merger
        self.dirpath, self.last_good_merge = dirpath, last_good_merge
        self.statistics = statistics
        rule = (options.threshold, options.floor, options.patience)
        self.loss = SpikeDetector(*rule)
        self.grad_norm = SpikeDetector(*rule, watched="gradient norm") if options.grad_norm else None
        self.recovery = Recovery(options, trainer, module, merger)
        self.restores = _Restores()
        self._seen = trainer.global_step  # the last step whose loss was read
        self._told = False  # that there is no loss to watch

    @property
    def merger(self) -> WindowMerger:
        """Merges the window."""
        return self._merger()

    @property
    def window(self) -> Window:
        """The run's snapshots."""
        return self.merger.window

    @property
    def calm(self) -> bool:
        """Whether the newest loss that was read is no outlier."""
        return self.loss.onset is None and (self.grad_norm is None or self.grad_norm.onset is None)

    @property
    def loss_scale(self) -> Tensor | None:
        """What fp16 training scales the loss by; ``None`` where it does not."""
        scaler = self.recovery.scaler
        return scaler._scale if scaler else None

    def note_gradients(self, optimizer: Optimizer) -> None:
        """Notes the norm of the gradients an optimizer is about to apply."""
        self.statistics.add_gradients(p for group in optimizer.param_groups for p in group["params"])

    def add_batch(self, outputs: Any) -> None:
        """Notes the loss of a micro-batch, as Lightning hands it to ``on_train_batch_end``."""
        automatic = self.module.automatic_optimization
        self.statistics.add_loss(outputs, self.trainer.accumulate_grad_batches if automatic else 1)

    def end_step(self, step: int, warming_up: bool, statistics: Statistics | None) -> bool:
        """Ends an optimizer step: acts on the loss of the one before it.

        Args:
            step: optimizer steps taken so far.
            warming_up: whether the learning rate is.
            statistics: of the step before, if there was one.

        Returns:
            Whether the live weights were replaced.

        Raises:
            TrainingDivergedError: where the options say to stop the run.
        """
        self.recovery.lr.end_step(step)
        restored = False
        if statistics is not None:
            for event in self._observe(statistics, warming_up):
                restored = restored or self._act(event, step)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0 and not restored:
            self._log(0.0 if self.calm else 1.0)
        return restored

    def close(self) -> None:
        """Sets the learning rates back to the schedule's."""
        self.recovery.lr.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as primitives."""
        return {
            "loss": self.loss.state_dict(),
            "grad_norm": self.grad_norm.state_dict() if self.grad_norm else None,
            "recovery": self.recovery.state_dict(),
            "restores": asdict(self.restores),
            "seen": self._seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict`` as if there had been no break."""
        self.loss.load_state_dict(state["loss"])
        if self.grad_norm and state["grad_norm"]:
            self.grad_norm.load_state_dict(state["grad_norm"])
        self.recovery.load_state_dict(state["recovery"])
        self.restores = _Restores(**{**state["restores"], "used": list(state["restores"]["used"])})
        self._seen = state["seen"]

    def _observe(self, seen: Statistics, warming_up: bool) -> list[SpikeEvent]:
        """What the detectors have to say of a step, spikes first."""
        if seen.loss is None and not self._told:
            self._told = True
            rank_zero_warn(
                "merge: training_step returned no loss, so no spike can be seen: return it, or {'loss': …}"
            )
        by_loss = by_norm = None
        if seen.loss is not None:
            by_loss = self.loss.observe(seen.step, seen.loss, not warming_up, seen.skipped)
        if self.grad_norm is not None and seen.grad_norm is not None and not seen.skipped:
            by_norm = self.grad_norm.observe(seen.step, seen.grad_norm, not warming_up)
        if not self.calm and self.window.mark_in_spike(self._seen, seen.step):
            self.merger.forget()
        self._seen = seen.step
        events = [event for event in (by_loss, by_norm) if event]
        return sorted(events, key=lambda event: event.kind == "shift")

    def _act(self, event: SpikeEvent, step: int) -> bool:
        """Does what the options say about an event; says whether the live weights were replaced."""
        if event.kind == "shift":
            self.window.clear_in_spike(event.onset)
            self.restores.in_a_row = 0  # it was not the weights
        elif self.options.action == "restore":
            return self._restore(event, step)
        self._report(event, "shift" if event.kind == "shift" else "warn")
        return False

    def _restore(self, event: SpikeEvent, step: int) -> bool:
        in_a_row = self.restores.in_a_row + 1 if self._is_cooling(event.onset) else 1
        if in_a_row > self.options.max_restores:
            self._stop(event, f"{in_a_row - 1} restores in a row did not help")
        for line in self.window.drop_damaged():  # reading past the end of a cut file would kill the process
            rank_zero_warn(f"merge: left out of the window: {line}")
        snapshots, lower = self._choose(event.onset, in_a_row)
        if not snapshots:
            newest = event.onset - self.options.guard
            return self._give_up(event, f"no clean snapshot is older than step {newest}, nothing to restore")
        lasting = self.recovery.lr.lasting * self.options.lr_factor * (_LOWER if lower else 1.0)
        start = time.perf_counter()
        try:
            weights = self.recovery.restore(snapshots, step, lasting)
        except Exception as error:
            log.exception("merge: the run could not be restored at step %s", step)
            return self._give_up(event, f"the restore failed ({error!r})")
        seconds = time.perf_counter() - start
        used = [snapshot.step for snapshot in snapshots]
        self.restores = _Restores(self.restores.count + 1, in_a_row, step, used)
        self._forget_the_spike(used[-1], step)
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
        )
        return True

    def _is_cooling(self, onset: int) -> bool:
        last = self.restores.step
        return last is not None and onset <= last + self.options.cooldown_steps

    def _choose(self, onset: int, in_a_row: int) -> tuple[list[Snapshot], bool]:
        """The snapshots to restore, and whether to lower the learning rate.

        The second restore in a row goes one window older; those after it, or where there is nothing older,
        stay there and lower the learning rate. Snapshots taken since the first one are not used; unless no
        other is left: then the oldest ones are, which are a window older as a rule.
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

    def _forget_the_spike(self, last_step: int, step: int) -> None:
        """Goes on as from clean weights: what was seen of the others is dropped."""
        self.statistics.forget()
        self._seen = step
        unmoved = max(1, self.options.rewarm_steps // _UNMOVED)
        for detector in (self.loss, self.grad_norm):
            if detector is not None:
                detector.restored(unmoved)
        try:
            self.window.drop_newer(last_step)
        except OSError as error:
            rank_zero_warn(f"merge: the window's manifest could not be written ({error}); training goes on")

    def _give_up(self, event: SpikeEvent, reason: str) -> bool:
        if self.options.no_snapshot == "stop":
            self._stop(event, reason)
        self._report(event, "warn", reason=f"{reason}; training goes on as it is")
        return False

    def _stop(self, event: SpikeEvent, reason: str) -> None:
        merge = self.last_good_merge(event.onset - self.options.guard)
        self._report(event, "stop", reason=f"{reason}: stopped", last_good_merge=merge and str(merge))
        folder = self.window.store.folder
        good = f"the last good merge is {merge}" if merge else "no good merge was published"
        if folder is not None and self.window.snapshots:
            good += f", the last snapshots are in {folder}"
        raise TrainingDivergedError(
            f"the {event.trigger} left its baseline of {event.baseline:.4g} at step {event.onset} (the last "
            f"value is {event.values[-1]:.4g}, the threshold {event.threshold:.4g}) and {reason}; {good}. "
            "Try a lower learning rate, gradient clipping, qk-norm or z-loss, or other data from there; "
            f"{self.dirpath / RECORD} has the whole story"
        )

    def _report(self, event: SpikeEvent, outcome: str, **more: Any) -> None:
        record = {"event": outcome, "trigger": event.trigger, **asdict(event), **more}
        del record["kind"]
        if self.trainer.is_global_zero:
            append(self.dirpath, {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **record})
        announce(self.trainer, record)
        self._log(0.0 if outcome == "shift" else 1.0)

    def _log(self, spike: float) -> None:
        metrics = {"merge/spike": spike, "merge/restores": float(self.restores.count)}
        threshold = self.loss.threshold
        if not math.isnan(threshold):
            metrics |= {"merge/loss_baseline": self.loss.baseline, "merge/loss_threshold": threshold}
        if self.restores.count:
            metrics["merge/lr_factor"] = self.recovery.lr.factor(self.trainer.global_step)
        log_metrics(self.trainer, metrics)
