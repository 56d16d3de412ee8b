"""Saves and restores the random generators of the process and of dataloaders, and what these count."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial
from types import BuiltinFunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

Restore = Callable[[], object]

_TRAINERS = {"lightning", "lightning_fabric", "pytorch_lightning", "transformers"}
_LOOKED_INTO = 100  # items of a container; a longer one holds data
_CONTAINERS = (list, tuple, dict)
_DEPTH = 8  # objects in objects
_OBJECTS = 10_000  # a data set may hold any number
_HOLD_NONE = (str, bytes, int, float, type, ModuleType, BuiltinFunctionType, Tensor, np.ndarray, nn.Module)


class RandomState:
    """The present state of the global random generators, and of some dataloaders.

    Of a dataloader this is every generator that it, its samplers, its collator or its data set holds, and
    every number outside the data set: a sampler may count epochs and shuffle each in another way.

    Args:
        dataloaders: those of the validation. Their worker processes have a state of their own.
    """

    def __init__(self, dataloaders: Iterable[Any] = ()) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        self._restores: list[Restore] = []
        seen: dict[int, object] = {}
        for dataloader in dataloaders:
            self._keep(dataloader, seen)

    def restore(self) -> None:
        """Restores all of it."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        for restore in self._restores:
            restore()

    def _keep(self, value: Any, seen: dict[int, object], counts: bool = True, depth: int = _DEPTH) -> None:
        """Notes how to restore the generators in an object, and its numbers if it ``counts``.

        A data set's numbers may say which file it has open, so they stay; but for those of ``set_epoch``.
        """
        if value is None or id(value) in seen or isinstance(value, _HOLD_NONE) or is_the_run(value):
            return
        if len(seen) >= _OBJECTS:
            return
        seen[id(value)] = value
        if restore := generator_restore(value):
            self._restores.append(restore)
        elif depth:
            own = getattr(value, "__dict__", {})
            counts = counts and not _is_data(value)
            if (counts or hasattr(value, "set_epoch")) and type(own) is dict:
                numbers = {name: item for name, item in own.items() if isinstance(item, (int, float))}
                self._restores.append(partial(own.update, numbers))
            for item in (*own.values(), *_held(value)):
                self._keep(item, seen, counts, depth - 1)


def _is_data(value: Any) -> bool:
    return isinstance(value, Dataset) or (
        hasattr(type(value), "__getitem__") and type(value) not in _CONTAINERS
    )


def _held(value: Any) -> Iterable[Any]:
    """What an object holds besides its attributes."""
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__]
    if type(value) in _CONTAINERS and len(value) <= _LOOKED_INTO:
        return list(value.values() if isinstance(value, dict) else value)
    return []


def is_the_run(value: Any) -> bool:
    """Whether a value leads to the whole run: a trainer (of any subclass), or a part of this package.

    Restoring that would undo what other threads have done meanwhile.
    """
    kinds = [(kind.__module__.partition(".")[0], kind.__name__) for kind in type(value).__mro__]
    is_ours = kinds[0][0] == "merge_callback" and not isinstance(value, nn.Module)
    return is_ours or any(owner in _TRAINERS and name in ("Trainer", "Fabric") for owner, name in kinds)


def generator_restore(value: Any) -> Restore | None:
    """A function that gives a random generator its present state back; ``None`` for any other value."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random):
        internal = value.getstate()
        return lambda: value.setstate(internal)
    if isinstance(value, np.random.RandomState):
        legacy = value.get_state()
        return lambda: value.set_state(legacy)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", bits)
    return None
