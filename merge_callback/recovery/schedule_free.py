"""Optimizers that train at one sequence of weights and evaluate another: schedule-free ones.

Their gradients are taken at y; what is evaluated, published and restored is the average x of a third
sequence, z, which is in their state. ``eval()`` turns the live weights into x and ``train()`` turns them back
into y, which rounds, so that here y is kept and put back bit for bit (Defazio et al., arXiv 2405.15682).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from merge_callback.recovery.deferred_signals import DeferredSignals
from merge_callback.sharding import local

_MODE = "train_mode"


def is_schedule_free(optimizer: Any) -> bool:
    """Whether an optimizer switches the live weights between two sequences."""
    switches = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    return switches and all(_MODE in group for group in optimizer.param_groups)


@contextmanager
def evaluated_weights(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Within, the live weights are those that the optimizers evaluate; afterwards they are as they were.

    For this moment there is a copy of the weights that these optimizers train.
    """
    switching: list[Any] = [o for o in optimizers if is_schedule_free(o) and any(_modes([o]))]
    if not switching:
        yield
        return
    with DeferredSignals(), torch.no_grad():
        trained = [p for o in switching for g in o.param_groups for p in g["params"] if o.state.get(p)]
        kept = [(live := local(p.data), live.clone()) for p in trained]
        modes = _modes(switching)
        try:
            for optimizer in switching:
                optimizer.eval()
            yield
        finally:
            for live, values in kept:
                live.copy_(values)
            _set_modes(switching, modes)


@contextmanager
def in_mode_of_evaluation(optimizers: Iterable[Optimizer]) -> Iterator[list[bool]]:
    """Within, the live weights count as evaluated ones: others were put in, and ``eval()`` does nothing.

    Yields:
        The modes before, for ``as_before``.
    """
    switching = [o for o in optimizers if is_schedule_free(o)]
    modes = _modes(switching)
    try:
        _set_modes(switching, [False] * len(modes))
        yield modes
    finally:
        _set_modes(switching, modes)


@contextmanager
def as_before(optimizers: Iterable[Optimizer], modes: Sequence[bool]) -> Iterator[None]:
    """Within ``in_mode_of_evaluation``, the modes are again what they were before."""
    switching = [o for o in optimizers if is_schedule_free(o)]
    now = _modes(switching)
    try:
        _set_modes(switching, modes)
        yield
    finally:
        _set_modes(switching, now)


@torch.no_grad()
def restart_sequences(optimizers: Iterable[Optimizer]) -> None:
    """Has all sequences go on from the live weights, which were overwritten by evaluated ones: x = y = z."""
    for optimizer in filter(is_schedule_free, optimizers):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                z = optimizer.state.get(parameter, {}).get("z")
                if isinstance(z, Tensor):
                    local(z).copy_(local(parameter.data))


def _modes(optimizers: Iterable[Optimizer]) -> list[bool]:
    return [group[_MODE] for optimizer in optimizers for group in optimizer.param_groups]


def _set_modes(optimizers: Iterable[Optimizer], modes: Sequence[bool]) -> None:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, mode in zip(groups, modes, strict=True):
        group[_MODE] = mode
