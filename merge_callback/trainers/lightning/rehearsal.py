"""Computes losses of training batches or of the validation again, inside a running Lightning fit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from merge_callback.engine.kept_state import (
    first_iterator,
    put_back,
    reset_metrics,
)
from merge_callback.recovery.evidence import copied
from merge_callback.signals.host import HeldBatch, LossOf, Spare, UnrepeatableStepError
from merge_callback.signals.step_statistics import loss_in
from merge_callback.trainers.lightning.metric_direction import MetricDirections
from merge_callback.trainers.lightning.private import (
    RESULTS,
    callback_metrics,
    epoch_metrics,
    names_of,
    results_of,
    run_training_step,
    takes_from_iterator,
    validation_loader,
    validation_loop,
    validation_results,
)
from merge_callback.trainers.lightning.undisturbed import python_state, random_state, replaced, undisturbed

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_VALIDATED = 8  # batches of each dataloader

_CALLED_LOSS = re.compile(r"(^|[^a-zA-Z])loss$|^loss([^a-zA-Z]|$)", re.IGNORECASE)


@contextmanager
def rehearsed_training(trainer: Trainer, module: LightningModule, spare: Spare | None) -> Iterator[LossOf]:
    """A ``Rehearsal`` of the training step, as Lightning runs it, without gradients.

    A step that needs gradients itself (a penalty on them, an adversary) is run with them, but only in
    single-process training. In a manual optimization only the loss is computed, and nothing is trained.

    Args:
        trainer: a trainer in fit, between two training steps.
        module: its module.
        spare: gives room for a copy of the live weights.

    Raises:
        UnrepeatableStepError: if the step takes items from an iterator.
    """
    if takes_from_iterator(trainer):
        raise UnrepeatableStepError("it takes its batches from an iterator (dataloader_iter)")
    if (iterator := first_iterator(module)) is not None:
        raise UnrepeatableStepError(f"it may take from an iterator that the module holds ({iterator!r:.80})")
    loop = trainer.fit_loop.epoch_loop
    with ExitStack() as stack:
        stack.enter_context(undisturbed(trainer, module, spare))
        stack.enter_context(replaced(loop, RESULTS, names_of(trainer)._ResultCollection(training=True)))
        stack.enter_context(_no_training(trainer, module))
        state = python_state(trainer, module)
        yield _TrainingLoss(trainer, module, state.restore)


@contextmanager
def _no_training(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """In this context a step of a manual optimization has no backward pass, no update and no gradients."""
    kept = [(parameter, parameter.grad, parameter.requires_grad) for parameter in module.parameters()]
    strategy = trainer.strategy
    with (
        replaced(strategy, "backward", _nothing),
        replaced(strategy, "optimizer_step", _only_the_closure),
    ):
        for parameter, _, _ in kept:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient, requires_grad in kept:
                parameter.grad = gradient
                parameter.requires_grad_(requires_grad)


def _nothing(*_: Any, **__: Any) -> None: ...


def _only_the_closure(optimizer: Any, closure: Any = None, *_: Any, **__: Any) -> Any:
    return closure() if closure else None


class _TrainingLoss:
    """Computes the training loss of some batches, each time from the same state except for the weights.

    Args:
        trainer: a trainer in fit.
        module: its module; whatever a step changes in it is restored before every pass.
        restore: restores its Python state.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, restore: Callable[[], object]) -> None:
        self.trainer, self._module, self._restore = trainer, module, restore
        self._random = random_state(trainer)
        self._buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        self._needs_gradients = False

    def __call__(self, batches: Sequence[HeldBatch]) -> float:
        if not batches:
            raise UnrepeatableStepError("its batches are no longer held")
        if not self._needs_gradients:
            try:
                return self._mean(batches)
            except RuntimeError as error:
                if self.trainer.world_size > 1 or "grad" not in str(error):
                    raise
                self._needs_gradients = True
        with torch.enable_grad():
            return self._mean(batches)

    def _mean(self, batches: Sequence[HeldBatch]) -> float:
        self._restore()
        for buffer, kept in self._buffers:
            put_back(buffer, kept)
        reset_metrics(self._module)
        self._random.restore()
        losses = [loss for loss in map(self._loss, batches) if loss is not None]
        if not losses:
            raise UnrepeatableStepError("it returned no loss this time")
        return math.fsum(losses) / len(losses)

    def _loss(self, held: HeldBatch) -> float | None:
        batch = apply_to_collection(copied(held.batch), Tensor, Tensor.clone)  # the step may write to it
        loss = loss_in(run_training_step(self.trainer, batch, held.batch_idx))
        if loss is None:
            return None
        return float(loss.detach().double().mean()) if isinstance(loss, Tensor) else float(loss)


@contextmanager
def rehearsed_validation(trainer: Trainer, module: LightningModule, spare: Spare | None) -> Iterator[LossOf]:
    """A ``Rehearsal`` of the first batches of the validation; the batches passed to it are ignored.

    Args:
        trainer: a trainer in fit, between two training steps.
        module: its module.
        spare: gives room for a copy of the live weights.

    Raises:
        UnrepeatableStepError: if no validation has logged a loss yet.
    """
    name = validation_loss(trainer)
    if validation_loader(trainer) is None or name is None:
        raise UnrepeatableStepError("there was no validation with a loss yet")
    random = random_state(trainer)

    def loss(_: Sequence[HeldBatch]) -> float:
        loop = validation_loop(trainer, at_most=_VALIDATED)
        random.restore()
        with replaced(trainer.fit_loop.epoch_loop, "val_loop", loop):
            trainer.validating = True
            try:
                loop.run()
            finally:
                trainer.training = True
        return float(epoch_metrics(results_of(loop), callback_metrics(trainer))[name])

    with undisturbed(trainer, module, spare):
        yield loss


def validation_loss(trainer: Trainer) -> str | None:
    """The name of the validation's loss: a monitored one, else one named loss, but not a part of a loss."""
    results = validation_results(trainer)
    names = epoch_metrics(results, trainer.callback_metrics)
    monitored = [getattr(callback, "monitor", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    for name in monitored:
        if name in names and MetricDirections().lower_is_better(name, trainer, results):
            return str(name)
    losses = [name for name in names if _CALLED_LOSS.search(name)]
    return min(losses, key=len, default=None)
