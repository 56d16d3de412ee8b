"""Validation with other weights, inside a running fit.

``trainer.validate()`` inside fit corrupts the loops' state, so this runs Lightning's own evaluation loop
beside the trainer's: same dataloaders, limits, precision and module hooks, but its own results, and nobody
hears of it.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor

from merge_callback.sharding.sharding import Sharding
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.merge import HalfRestoredError, Merge
from merge_callback.training.deferred_signals import DeferredSignals
from merge_callback.training.kept_state import RandomState
from merge_callback.training.reporting import gains, log_metrics
from merge_callback.training.undisturbed import replaced, undisturbed

log = logging.getLogger(__name__)


class MergedValidation:
    """Validates each merge once and makes ``merged/…`` known to callbacks that monitor it."""

    def __init__(self, trainer: Trainer, module: LightningModule, sharding: Sharding | None = None) -> None:
        self.trainer, self.module = trainer, module
        self.sharding = sharding or Sharding({}, {})
        self.step = -1
        self.metrics: dict[str, float] = {}
        self._random: RandomState | None = None

    def note_random_state(self) -> None:
        """Before a live validation: keeps the generators, so that the merged one draws the same numbers.

        Else the gain would compare two weights on two samples wherever data is shuffled or masked at random.
        """
        self._random = RandomState(self.trainer) if _validation_is_next(self.trainer) else None

    def update(self, merge: Merge | None) -> None:
        """Validates ``merge`` if it is new. A validation that fails is reported; the run goes on.

        Raises:
            HalfRestoredError: where the live weights could not be put back, on any rank.
        """
        results = self.trainer.fit_loop.epoch_loop.val_loop._results
        live = epoch_metrics(results, self.trainer.callback_metrics)
        if merge is not None and merge.step != self.step:
            problem = None
            try:
                merged = validate_with(self.trainer, self.module, merge.arena, self._random, self.sharding)
            except Exception as error:
                if DeferredSignals.has_raised(error):
                    raise
                problem = error
            try:
                self.sharding.ranks.agree(problem)
            except Exception:
                is_half_back = isinstance(problem, HalfRestoredError)
                if any(self.sharding.ranks.exchange(is_half_back)):
                    raise HalfRestoredError(
                        "after a merged validation the live weights are lost"
                    ) from problem
                log.exception("merge: validation with the merged weights failed; the live weights are back")
            else:
                self.step = merge.step
                self.metrics = {f"merged/{name}": float(value) for name, value in merged.items()}
                log_metrics(self.trainer, {**self.metrics, **gains(self.trainer, results, live, merged)})
        # A monitor must find its key from the first validation on: so far the merge is the model itself.
        known = {f"merged/{name}": value for name, value in live.items()}
        known |= {name: torch.tensor(value, device="cpu") for name, value in self.metrics.items()}
        self.trainer.callback_metrics.update(known)

    def state_dict(self) -> dict[str, Any]:
        """The last validated merge and its metrics, as primitives."""
        return {"step": self.step, "metrics": dict(self.metrics)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self.step, self.metrics = state["step"], dict(state["metrics"])


def validate_with(
    trainer: Trainer,
    module: LightningModule,
    merged: Arena,
    random: RandomState | None = None,
    sharding: Sharding | None = None,
) -> dict[str, Tensor]:
    """Runs the fit's validation with ``merged`` in place of the live weights.

    To be called from ``on_validation_end``. Whatever happens inside, the live weights, the module's Python
    state and torchmetrics, schedulers, and every random generator come back bit for bit.

    Args:
        trainer: in fit, at the end of a validation.
        module: its module.
        merged: weights in the model's layout and dtypes; with several ranks what this one keeps of them.
        random: the generators to begin with; default: as they are.
        sharding: what each rank keeps, where there are several.

    Returns:
        Every metric the module logged for the epoch, by its name in ``trainer.callback_metrics``.

    Raises:
        Exception: whatever the module's validation raises.
    """
    loop, sharding = BesideLoop(trainer), sharding or Sharding({}, {})
    swap = undisturbed(trainer, module, merged.buffer.device)
    with DeferredSignals() as signals, ExitStack() as stack:

        def put_in() -> dict[str, Tensor]:
            tensors = stack.enter_context(swap)
            stack.enter_context(replaced(trainer.fit_loop.epoch_loop, "val_loop", loop))
            merged.copy_to(sharding.own(tensors))
            return tensors

        sharding.spread(sharding.ranks.agreed(put_in))
        if random is not None:
            random.restore()
        with signals.let_through():
            loop.run()
        return epoch_metrics(loop._results, trainer._logger_connector._callback_metrics)


def _validation_is_next(trainer: Trainer) -> bool:
    """Whether the fit validates after this batch; Lightning knows, but takes ten times as long to say no."""
    loop = trainer.fit_loop
    progress, every = loop.epoch_loop.batch_progress, trainer.val_check_batch
    if every is not None and not progress.is_last_batch and not trainer.should_stop:
        if every == math.inf:  # the length of an epoch is not known
            every = trainer.limit_train_batches
        # Depending on the options the batches of the epoch count, or those of the run.
        if isinstance(every, float) or (progress.current.ready % every and progress.total.ready % every):
            return False
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


class BesideLoop(_EvaluationLoop):
    """An evaluation loop that shares the dataloaders of the trainer's validation loop.

    Args:
        trainer: in fit.
        at_most: batches of each dataloader.
    """

    def __init__(self, trainer: Trainer, at_most: float = math.inf) -> None:
        self._at_most = at_most
        self._live = trainer.fit_loop.epoch_loop.val_loop
        super().__init__(
            trainer,
            TrainerFn.FITTING,
            RunningStage.VALIDATING,
            verbose=False,
            inference_mode=self._live.inference_mode,
        )

    def setup_data(self) -> None:
        """Takes the dataloaders of the trainer's loop."""
        self._combined_loader = self._live._combined_loader
        self._max_batches = [min(n, self._at_most) for n in self._live._max_batches]
        self._seen_batches_per_dataloader = defaultdict(int)


def epoch_metrics(results: _ResultCollection, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the ``known`` metrics that a validation logged for its epoch."""
    names = [n for r in results.values() if r.meta.on_epoch for n in results._forked_name(r, on_step=False)]
    return {name: known[name] for name in names if name in known and name != "step"}  # an axis, no metric
