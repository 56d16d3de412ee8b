"""Validates other weights inside a running fit.

``trainer.validate()`` inside fit corrupts the loops' state, so this runs a second evaluation loop of
Lightning's: with the same dataloaders, limits, precision and module hooks, but with its own results, and
without loggers or other callbacks.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from merge_callback.engine.candidates import Scores
from merge_callback.engine.expert_merge import ExpertMerge
from merge_callback.engine.kept_state import tracker_lengths
from merge_callback.engine.random_state import RandomState
from merge_callback.engine.session import MergeSession
from merge_callback.engine.validations import Scored
from merge_callback.messages import info
from merge_callback.metrics import GAIN, MERGED
from merge_callback.recovery.deferred_signals import DeferredSignals
from merge_callback.recovery.schedule_free import in_mode_of_evaluation
from merge_callback.sharding.sharding import Sharding
from merge_callback.signals.host import Spare
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.live_merge import HalfRestoredError
from merge_callback.snapshots.merge import Merge
from merge_callback.trainers.lightning.metric_direction import MetricDirections
from merge_callback.trainers.lightning.private import (
    callback_metrics,
    epoch_metrics,
    is_validation_next,
    names_of,
    pause_stopping,
    results_of,
    validation_loop,
    validation_results,
)
from merge_callback.trainers.lightning.seen_weights import SeenWeights
from merge_callback.trainers.lightning.undisturbed import random_state, replaced, undisturbed

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

    from merge_callback.trainers.lightning.host import LightningHost

log = logging.getLogger(__name__)

_WELL_KNOWN = {"lightning", "pytorch_lightning", "merge_callback"}

_MEASURING = [
    f"on_validation_{when}" for when in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end")
]


class MergedValidation:
    """Validates each merge once and exposes ``merged/…`` to callbacks that monitor it."""

    def __init__(
        self,
        host: LightningHost,
        sharding: Sharding | None = None,
        directions: MetricDirections | None = None,
        taking_part: Sequence[Callback] = (),
    ) -> None:
        self._host, self.trainer, self.module = host, host.trainer, host.lightning_module
        self.sharding, self._taking_part = sharding or Sharding({}, {}), taking_part
        self._directions, self._reported_unknown = directions or MetricDirections(), False
        self.step = -1
        self.metrics: dict[str, float] = {}
        self._random: RandomState | None = None
        self._trackers: dict[nn.Module, int] | None = None
        self._seen = SeenWeights(self.trainer, self.module)
        self._has_failed = self._reported_missing = False
        self._names: list[str] = []  # of all merges, if there are several

    def note_beginning(self) -> None:
        """Saves the generators before a live validation, so that the merged one draws the same numbers.

        If data is shuffled or masked at random, the gain would else compare two models on two samples.
        """
        is_next = is_validation_next(self.trainer)
        self._random = random_state(self.trainer) if is_next else None
        self._trackers = tracker_lengths(self.module, *self._taking_part) if is_next else None

    def note_first_step(self) -> None:
        """Notes which weights a live validation is run with."""
        self._seen.note_live()

    def update(self, session: MergeSession) -> None:
        """Validates the present merge, if it is new, or those of the live weights with finished experts.

        A failed validation is logged; the run goes on. Afterwards there are ``merged/…`` values of exactly
        the metrics that the merge was validated with. A monitor must find its key from the first validation
        on, so until there is a merge the live values are repeated.

        Raises:
            HalfRestoredError: if the live weights could not be put back, on any rank.
        """
        self.sharding = session.sharding
        live, scored = self._live(), None
        several = session.pipeline.candidates.names
        self._names = [*(method.label for method in session.options.methods.values()), *several] * bool(
            several
        )
        if session.experts:
            scored = self._validate_experts(session.experts, session.live(), live)
        elif (merge := session.current_merge()) is not None and merge.step != self.step:
            seconds = -time.monotonic()
            scored = self._compare(session, merge, live) if several else self._validate_one(merge, live)
            if scored is not None:
                scored = replace(scored, newest=merge.snapshots[-1], seconds=seconds + time.monotonic())
            else:
                self.step, self.metrics, self._has_failed = -1, {}, True
        if scored is not None:
            self.step, self._has_failed, self.metrics = scored.step, False, dict(scored.shown)
            self._report_missing(sorted(live.keys() - scored.metrics.keys()))
        session.note_validation(live, scored)
        self._show(live)

    def note_live(self, session: MergeSession) -> None:
        """Notes what the live weights score, if no merge is to be validated."""
        session.note_validation(self._live())

    def _validate_one(self, merge: Merge, live: Mapping[str, Tensor]) -> Scored | None:
        """What a merge scores."""
        merged = self._validate(merge.arena)
        return None if merged is None else self._scored(live, merged, merge.step)

    def _compare(self, session: MergeSession, merge: Merge, live: Mapping[str, Tensor]) -> Scored | None:
        """What the best of a merge and the candidates scores, and what the others do."""

        def evaluate(merge: Merge | None, batches: int | None) -> dict[str, Tensor] | None:
            return self._validate(merge.arena if merge else None, batches)

        found = session.compare(merge, evaluate, live, partial(self._lower_is_better, live))
        if found is None:
            return None
        shown, numbers = found.logged(lambda name, metric: f"{MERGED}{name}/{metric}")
        scored = self._scored(live, found.metrics, found.step)
        return replace(scored, shown={**shown, **scored.shown}, numbers=numbers, compared=found)

    def _live(self) -> dict[str, Tensor]:
        return epoch_metrics(validation_results(self.trainer), self.trainer.callback_metrics)

    def _show(self, live: Mapping[str, Tensor]) -> None:
        known = {name: torch.tensor(value, device="cpu") for name, value in self.metrics.items()}
        if self.step == -1 and not self._has_failed:
            known = {key: live[name] for key, name in self._keys(live).items()}
        shown = self.trainer.callback_metrics
        shown.update(known)
        missing = self._keys(live).keys() - known.keys()
        for name in missing:
            shown.pop(name, None)
            shown.pop(name.replace(MERGED, GAIN, 1), None)
        # A monitor that does not find its key ends the run.
        shown.update(dict.fromkeys(missing & self._monitored(), torch.tensor(math.nan, device="cpu")))
        self._hold_stopping(missing)

    def _keys(self, live: Iterable[str]) -> dict[str, str]:
        """The names of all merged metrics, each with that of the live one."""
        return {
            f"{MERGED}{candidate}{name}": name
            for name in live
            for candidate in ("", *(f"{candidate}/" for candidate in self._names))
        }

    def close(self) -> None:
        """Leaves the trainer's callbacks as they were."""
        self._hold_stopping(())

    def _validate(self, merged: Arena | None, batches: int | None = None) -> dict[str, Tensor] | None:
        """The metrics of a merge; ``None`` if its validation failed, which is logged.

        Args:
            merged: its weights; ``None`` for the live ones.
            batches: of each dataloader that are validated; ``None`` for all.
        """
        problem = None
        try:
            with self._directions.listening(self.module):
                metrics = validate_with(
                    self.trainer,
                    self.module,
                    merged,
                    self._random,
                    self.sharding,
                    self._taking_part,
                    self._trackers,
                    self._seen,
                    math.inf if batches is None else batches,
                    self._host.spare,
                )
        except Exception as error:
            if DeferredSignals.has_raised(error):
                raise
            problem = error
        try:
            self.sharding.ranks.agree(problem)
        except Exception:
            if any(self.sharding.ranks.exchange(isinstance(problem, HalfRestoredError))):
                raise HalfRestoredError("a merged validation could not restore the live weights") from problem
            log.exception("merge: validation with the merged weights failed; the live weights were restored")
            return None
        return metrics

    def _validate_experts(
        self, experts: ExpertMerge, model: ModelTensors, live: Mapping[str, Tensor]
    ) -> Scored | None:
        """What the best merge of the live weights with finished experts scores; a failure is logged."""
        results, is_lower = validation_results(self.trainer), self._directions.lower_is_better
        lower = {name: is_lower(name, self.trainer, results, self.module) for name in live}
        monitored = [name.removeprefix(MERGED) for name in sorted(self._monitored())]
        seconds = -time.monotonic()
        try:
            found = experts.validate(model, self._validate, lower, monitored)
        except Exception as error:
            if isinstance(error, HalfRestoredError) or DeferredSignals.has_raised(error):
                raise
            log.exception("merge: the merge with the other experts failed; training goes on")
            found = None
        if found is None:
            self.step, self.metrics, self._has_failed = -1, {}, True
            return None
        scored = self._scored(live, found[0], self._host.step)
        return replace(scored, numbers=found[1], seconds=seconds + time.monotonic())

    def _scored(self, live: Mapping[str, Tensor], merged: Scores, step: int) -> Scored:
        shown = {f"{MERGED}{name}": float(value) for name, value in merged.items()}
        return Scored(merged, shown, self._lower_is_better(live, merged), step)

    def _monitored(self) -> set[str]:
        monitors = [getattr(c, "monitor", None) for c in self.trainer.callbacks]  # type: ignore[attr-defined]
        return {str(m) for m in (*monitors, *(c.monitor for c in self.trainer.lr_scheduler_configs)) if m}

    def _hold_stopping(self, missing: Collection[str]) -> None:
        """Disables early stopping on missing values, since NaN would stop the run."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, names_of(self.trainer).EarlyStopping):
                pause_stopping(callback, callback.monitor in missing)

    def _report_missing(self, missing: list[str]) -> None:
        """Reports once which callbacks take no part, if that may matter."""
        others = [c for c in self.trainer.callbacks if c not in self._taking_part]  # type: ignore[attr-defined]
        idle = [type(c).__name__ for c in others if _may_prepare_or_log(c, names_of(self.trainer).Callback)]
        if (missing or idle) and not self._reported_missing:
            self._reported_missing = True
            named = [type(c).__name__ for c in self._taking_part] + idle
            without = f", so there is no merged/… value of {', '.join(missing)}" if missing else ""
            info(
                f"merge: the hooks of {', '.join(idle) or 'callbacks'} are not called when a merge is "
                f"validated{without}. Name those that prepare batches or compute metrics in "
                f"evaluate_with={named}"
            )

    def _lower_is_better(self, live: Mapping[str, Tensor], merged: Scores) -> dict[str, bool | None]:
        """Whether lower is better, by metric; reports once of which that is not known, and the remedy."""
        results = validation_results(self.trainer)
        is_lower = self._directions.lower_is_better
        lower = {name: is_lower(name, self.trainer, results, self.module) for name in merged if name in live}
        unknown = sorted(name for name, direction in lower.items() if direction is None)
        if unknown and not self._reported_unknown:
            self._reported_unknown = True
            info(
                f"merge: no {GAIN}… is logged for {', '.join(unknown)}, since it is not known whether "
                f"lower is better; pass lower_is_better={unknown[:1]}, or higher_is_better="
            )
        return lower

    def state_dict(self) -> dict[str, Any]:
        """The last validated merge and its metrics, as primitives."""
        return {"step": self.step, "metrics": dict(self.metrics)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self.step, self.metrics = state["step"], dict(state["metrics"])


def validate_with(
    trainer: Trainer,
    module: LightningModule,
    merged: Arena | None,
    random: RandomState | None = None,
    sharding: Sharding | None = None,
    taking_part: Sequence[Callback] = (),
    trackers: Mapping[nn.Module, int] | None = None,
    seen: SeenWeights | None = None,
    at_most: float = math.inf,
    spare: Spare | None = None,
) -> dict[str, Tensor]:
    """Runs the fit's validation with ``merged`` in place of the live weights.

    Call it from ``on_validation_end``. Whatever happens inside, the live weights, the module's Python state
    and torchmetrics, schedulers, and every random generator are restored bit for bit.

    Args:
        trainer: a trainer in fit, at the end of a validation.
        module: its module.
        merged: weights in the model's layout and dtypes; with several ranks, this rank's part of them. With
            ``None`` it is the live weights that are validated.
        random: the state of the generators to begin with; default: the present one.
        sharding: what each rank keeps, if there are several.
        taking_part: the callbacks whose hooks are called.
        trackers: the lengths of the ``MetricTracker`` before the last validation.
        seen: the weights that the live validation was run with.
        at_most: batches of each dataloader that are validated.
        spare: gives room for a copy of the live weights.

    Returns:
        Every metric the module logged for the epoch, by its name in ``trainer.callback_metrics``.

    Raises:
        Exception: any exception of the module's validation.
    """
    loop, sharding = validation_loop(trainer, at_most), sharding or Sharding({}, {})
    swap = undisturbed(trainer, module, spare, taking_part, trackers)
    with DeferredSignals() as signals, ExitStack() as stack:

        def put_in() -> dict[str, Tensor]:
            tensors = stack.enter_context(swap)
            stack.enter_context(replaced(trainer.fit_loop.epoch_loop, "val_loop", loop))
            if merged is not None:
                merged.copy_to(sharding.own(tensors))
            stack.enter_context(in_mode_of_evaluation(trainer.optimizers))
            return tensors

        sharding.spread(sharding.ranks.agreed(put_in))
        if random is not None:
            random.restore()
        with seen.checked() if seen and merged is not None else nullcontext(), signals.let_through():
            loop.run()
        return epoch_metrics(results_of(loop), callback_metrics(trainer))


def taking_part(trainer: Trainer, named: Sequence[str]) -> list[Callback]:
    """The trainer's callbacks of the named classes, and those that are parts of the module.

    Raises:
        ValueError: if no callback is of a named class.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    kinds = {callback: {kind.__name__ for kind in type(callback).__mro__} for callback in callbacks}
    for name in named:
        if not any(name in names for names in kinds.values()):
            raise ValueError(
                f"evaluate_with={list(named)!r}: the trainer has no callback of the class {name!r}; it has "
                f"{', '.join(type(callback).__name__ for callback in callbacks)}"
            )
    parts = {id(part) for part in trainer.lightning_module.modules()}  # anomalib's models bring theirs along
    return [callback for callback, names in kinds.items() if names & set(named) or id(callback) in parts]


def _may_prepare_or_log(callback: Callback, base: type[Callback]) -> bool:
    """Whether a user's callback has hooks that may change what a validation measures, or log."""
    if any(hook in vars(callback) for hook in _MEASURING):  # LambdaCallback
        return True
    if type(callback).__module__.partition(".")[0] in _WELL_KNOWN:
        return False
    return any(getattr(type(callback), hook) is not getattr(base, hook) for hook in _MEASURING)
