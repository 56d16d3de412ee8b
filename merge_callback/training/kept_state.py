"""Everything a validation may change, kept and put back."""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset
from torchmetrics import Metric, MetricCollection

from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.layout import Layout

_PLAIN_TENSOR = 1 << 20  # elements; a larger plain attribute is a cache or a data set, and not copied
_LOOKED_INTO = 10_000  # items; of a larger container only the container itself is kept
# Exact types: a subclass may refuse to be written to (Hugging Face's ModelOutput does).
_CONTAINERS = (dict, list, set, deque, OrderedDict, defaultdict, Counter, AttributeDict)

_LIBRARIES = {"torch", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics", "numpy"}
_LIBRARIES |= sys.stdlib_module_names

Restore = Callable[[], object]


class RandomState:
    """The global random generators and those that the validation dataloaders own, as they are now."""

    def __init__(self, trainer: Trainer) -> None:
        self._states = _collect_rng_states(include_cuda=torch.cuda.is_available())
        loader = trainer.fit_loop.epoch_loop.val_loop._combined_loader
        owners = [
            o for dataloader in (loader.flattened if loader is not None else []) for o in _owners(dataloader)
        ]
        self._restores = [r for o in owners if (r := _generator_restore(getattr(o, "generator", None)))]

    def restore(self) -> None:
        """Sets all of them back."""
        _set_rng_states(self._states)
        for restore in self._restores:
            restore()


@contextmanager
def kept_weights(
    trainer: Trainer, module: nn.Module, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], Restore]]:
    """Hands out the live tensors (or shards), and what gives them and all other buffers their bits back.

    That is called on exit, too.
    """
    model = ModelTensors.of(module, trainer.strategy.model)
    live = Arena.empty(Layout.of(model.tensors), device)
    live.copy_from(model.tensors)
    transient = [(buffer, buffer.clone()) for buffer in model.transient]

    def restore() -> None:
        ModelTensors.of(
            module, trainer.strategy.model
        )  # shards are shown again, where FSDP has gathered them
        live.copy_to(model.tensors)
        for buffer, kept in transient:
            _put_back(buffer, kept)

    try:
        yield model.tensors, restore
    finally:
        restore()


@contextmanager
def kept_python_state(trainer: Trainer, module: nn.Module) -> Iterator[Restore]:
    """On exit all Python state of the module, its optimizers and schedulers is as it was.

    That is attributes, the containers and objects of own classes in them, metrics and generators: hooks count
    validations, keep the best one, step a scheduler or an environment. What is handed out puts it back.
    """
    restores: list[Restore] = []
    seen: set[int] = set()
    for owner in (*trainer.optimizers, *(config.scheduler for config in trainer.lr_scheduler_configs)):
        _keep(vars(owner), restores, seen)
    for part in module.modules():
        _keep(vars(part), restores, seen)
        if not isinstance(part, Metric):  # a metric is reset before it is used, which replaces its tensors
            _keep_plain_tensors(part, restores)

    def restore_all() -> None:
        with ExitStack() as stack:  # restores the rest where one fails
            for restore in restores:
                stack.callback(restore)

    try:
        yield restore_all
    finally:
        restore_all()


def reset_metrics(module: nn.Module) -> None:
    """Empties the module's torchmetrics."""
    for part in module.modules():
        if isinstance(part, Metric):
            part.reset()
        if isinstance(part, MetricCollection):
            part._state_is_copy = True  # makes it link the states of its compute groups again


def _keep(value: Any, restores: list[Restore], seen: set[int]) -> None:
    """Notes how to restore a container, a scheduler and all they hold, or a generator."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if type(value) in _CONTAINERS:
        restores.append(_container_restore(value))
    elif restore := _generator_restore(value):
        restores.append(restore)
    if type(value) in (*_CONTAINERS, tuple) and len(value) <= _LOOKED_INTO:
        for item in list(value.values()) if isinstance(value, dict) else list(value):
            _keep(item, restores, seen)
    elif isinstance(value, LRScheduler):  # chained schedulers hold others
        _keep(vars(value), restores, seen)
    elif isinstance(value, np.ndarray) and value.size <= _PLAIN_TENSOR:
        restores.append(_array_restore(value))
    elif _is_of_users(value):
        _keep(vars(value), restores, seen)
        _keep_plain_tensors(value, restores)


def _is_of_users(value: Any) -> bool:
    """Whether a value is an object of somebody's own class: an environment, a buffer of past steps."""
    if (
        not hasattr(value, "__dict__")
        or isinstance(value, (type, Tensor, nn.Module, Dataset))
        or callable(value)
    ):
        return False
    return type(value).__module__.partition(".")[0] not in _LIBRARIES


def _container_restore(container: Any) -> Restore:
    kept = copy.copy(container)

    def restore() -> None:
        if isinstance(container, dict):  # not emptied first: a thread may be reading a module's attributes
            for key in [key for key in container if key not in kept]:
                del container[key]
            container.update(kept)
            if list(container) == list(kept):
                return
        container.clear()
        container.extend(kept) if isinstance(container, (list, deque)) else container.update(kept)

    return restore


def _generator_restore(value: Any) -> Restore | None:
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


def _array_restore(array: np.ndarray) -> Restore:
    kept = array.copy()
    return lambda: np.copyto(array, kept) if array.flags.writeable else None


def _keep_plain_tensors(part: object, restores: list[Restore]) -> None:
    for value in vars(part).values():
        if isinstance(value, Tensor) and value.numel() <= _PLAIN_TENSOR:
            restores.append(_tensor_restore(value.data))


def _tensor_restore(tensor: Tensor) -> Restore:
    kept = tensor.clone()
    return lambda: _put_back(tensor, kept)


def _put_back(tensor: Tensor, kept: Tensor) -> None:
    # An expanded tensor can't be written to, nor can it have changed. One that was made in a validation
    # before the fit is an inference tensor.
    if not torch.equal(tensor, kept):
        with torch.inference_mode(tensor.is_inference()):
            tensor.copy_(kept)


def _owners(dataloader: Any) -> list[Any]:
    sampler, batches = getattr(dataloader, "sampler", None), getattr(dataloader, "batch_sampler", None)
    return [dataloader, sampler, batches, getattr(batches, "sampler", None)]
