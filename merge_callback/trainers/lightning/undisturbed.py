"""Runs a live module on any data, with other weights, without leaving a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from merge_callback.engine.kept_state import (
    PythonState,
    kept_weights,
    reset_metrics,
)
from merge_callback.engine.random_state import RandomState, Restore
from merge_callback.recovery.deferred_signals import DeferredSignals
from merge_callback.signals.host import Spare
from merge_callback.trainers.lightning.private import (
    LOGGER_CONNECTOR,
    checkpoint_connector,
    names_of,
    own_logger_connector,
    validation_loader,
)
from merge_callback.trainers.lightning.quiet import quiet_logger, silenced

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

Replacement = tuple[object, str, Any]
"""An object, the name of an attribute, and a value for it."""


@contextmanager
def undisturbed(
    trainer: Trainer,
    module: LightningModule,
    spare: Spare | None,
    taking_part: Sequence[Callback] = (),
    trackers: Mapping[nn.Module, int] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """In this context the module may be run on any data, with other weights, without any effect on the run.

    On exit, also by an exception, the live weights, the module's Python state and torchmetrics, schedulers,
    and every random generator are as they were, bit for bit. Gradients are off; the torchmetrics begin empty;
    callbacks and loggers can be read as usual, but no hook of a callback is called, and nothing is logged.

    If a hook saves the run in this context, the run is saved as it was before: by
    ``trainer.save_checkpoint``, by the connector's ``dump_checkpoint``, or by the module's ``state_dict``.
    But the ``state_dict`` of a submodule shows the other weights. A signal's handler finds the run as it was
    before, and its changes to it stay.

    Args:
        trainer: a trainer in fit. Signals have to be deferred on entry and on exit.
        module: its module.
        spare: gives room for a copy of the live weights.
        taking_part: the callbacks whose hooks are called; their state is restored like the module's.
        trackers: the lengths of the ``MetricTracker`` before the last validation.

    Yields:
        The live tensors (or shards) by name.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    loop = trainer.fit_loop.epoch_loop
    others: list[Replacement] = [
        (trainer, "callbacks", list(callbacks)),
        (trainer, "loggers", [quiet_logger(logger) for logger in trainer.loggers]),
        (trainer, "should_stop", trainer.should_stop),
        (trainer, LOGGER_CONNECTOR, own_logger_connector(trainer)),
        (loop, "val_loop", loop.val_loop),
    ]
    with ExitStack() as stack:
        # Hooks of the validation run in its inference mode, whose tensors could never be trained on.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        tensors, state, restore = stack.enter_context(_kept(trainer, module, spare, taking_part))
        own: list[Replacement] = []
        set_within: list[Replacement] = []  # by handlers
        stack.callback(_set_all, set_within)

        @contextmanager
        def as_it_was(stays: bool = False) -> Iterator[None]:
            with DeferredSignals(), torch.inference_mode(False), ExitStack() as present:
                present.enter_context(_kept(trainer, module, spare, taking_part))
                for replacement in own:
                    present.enter_context(replaced(*replacement))
                restore()
                try:
                    yield
                finally:
                    if stays:
                        state.renew()
                        now = [(owner, name, getattr(owner, name)) for owner, name, _ in own]
                        set_within.extend(new for new, old in zip(now, own, strict=True) if new[2] != old[2])
                        own[:] = now

        for owner, name, value in (*others, *_saving(trainer, module, as_it_was)):
            own.append((owner, name, getattr(owner, name)))
            stack.enter_context(replaced(owner, name, value))
        stack.enter_context(
            silenced([c for c in callbacks if c not in taking_part], names_of(trainer).Callback)
        )
        stack.enter_context(DeferredSignals.around_handlers(partial(as_it_was, stays=True)))
        reset_metrics(module, *taking_part, trackers=trackers)
        yield tensors


def random_state(trainer: Trainer) -> RandomState:
    """The present state of the global random generators, and of those that the validation dataloaders own."""
    loader = validation_loader(trainer)
    return RandomState(loader.flattened if loader is not None else ())


def python_state(
    trainer: Trainer, module: LightningModule, taking_part: Sequence[Callback] = ()
) -> PythonState:
    """The present Python state of a module, its optimizers and schedulers, and of the callbacks."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    others = [c for c in trainer.callbacks if c not in taking_part]  # type: ignore[attr-defined]
    return PythonState(module, trainer.optimizers, schedulers, taking_part, others)


@contextmanager
def _kept(
    trainer: Trainer, module: LightningModule, spare: Spare | None, taking_part: Sequence[Callback]
) -> Iterator[tuple[dict[str, Tensor], PythonState, Restore]]:
    """Yields the live tensors, the Python state, and a function that restores both, as exit does."""
    random, state = random_state(trainer), python_state(trainer, module, taking_part)
    model = trainer.strategy.model or module
    with ExitStack() as stack:
        stack.callback(random.restore)
        stack.callback(state.restore)
        tensors, restore_weights = stack.enter_context(kept_weights(module, model, spare))

        def restore() -> None:
            restore_weights()
            state.restore()
            random.restore()

        yield tensors, state, restore


def _saving(
    trainer: Trainer, module: LightningModule, as_it_was: Callable[[], AbstractContextManager[None]]
) -> list[Replacement]:
    """Replacements of the functions that save a run, which save it as it was.

    A state dict only refers to the weights, which change back when it is returned, so it is copied.
    """
    connector, kind = checkpoint_connector(trainer), type(module)
    present = kind.state_dict

    def save_checkpoint(*args: Any, **options: Any) -> None:
        with as_it_was():
            trainer.save_checkpoint(*args, **options)

    def dump_checkpoint(*args: Any, **options: Any) -> dict[str, Any]:
        with as_it_was():
            checkpoint = connector.dump_checkpoint(*args, **options)
            return {**checkpoint, "state_dict": copy.deepcopy(checkpoint["state_dict"])}

    def state_dict(self: LightningModule, *args: Any, **options: Any) -> Any:
        if self is not module:
            return present(self, *args, **options)
        with as_it_was():
            return copy.deepcopy(module.state_dict(*args, **options))

    return [
        (trainer, "save_checkpoint", save_checkpoint),
        (connector, "dump_checkpoint", dump_checkpoint),
        (kind, "state_dict", state_dict),  # on the class: a module that has a function can't be pickled
    ]


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """In this context an attribute has another value."""
    kept, was_own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if name in vars(owner) and not was_own:  # the class's attribute is visible again
            delattr(owner, name)
        else:
            setattr(owner, name, kept)


def _set_all(replacements: list[Replacement]) -> None:
    for replacement in replacements:
        setattr(*replacement)
