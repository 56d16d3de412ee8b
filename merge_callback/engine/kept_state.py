"""Saves and restores everything that running a live module may change."""

from __future__ import annotations

import io
import logging
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import (
    BuiltinFunctionType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from merge_callback.engine.random_state import Restore, generator_restore, is_the_run
from merge_callback.signals.host import Spare
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.capture import ModelTensors, settled
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.live_merge import HalfRestoredError, free_memory

log = logging.getLogger(__name__)

_PLAIN_TENSOR = 1 << 24  # elements; a larger plain attribute is a cache or a data set, and not copied
_LOOKED_INTO = 10_000  # items; of a larger container only the container itself is kept
# Exact types: a subclass may refuse to be written to (Hugging Face's ModelOutput does).
_CONTAINERS = {dict, list, set, tuple, deque, OrderedDict, defaultdict, Counter}
_CONTAINERS_OF_LIGHTNING = {"AttributeDict"}  # hyperparameters

_LIBRARIES = {"torch", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics", "numpy"}
_LIBRARIES |= sys.stdlib_module_names

_WITHOUT_PARTS = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
_NO_STATE = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType)


@contextmanager
def kept_weights(
    module: nn.Module, root: nn.Module, spare: Spare | None
) -> Iterator[tuple[dict[str, Tensor], Restore]]:
    """Yields the live tensors (or shards), and a function that restores them and all other buffers exactly.

    The function is called on exit, too. It tries twice: after a failure half way there may be more memory.

    Args:
        module: the live model.
        root: the module that wraps it; the model itself if nothing does.
        spare: gives room for the copy; default: new memory on the host.

    Raises:
        HalfRestoredError: if both attempts fail.
    """
    model = ModelTensors.of(module, root)
    with (spare or _in_host_memory)(Layout.of(model.tensors)) as live:
        live.copy_from(model.tensors)
        transient = [(buffer, buffer.clone()) for buffer in model.transient]

        @torch.inference_mode(False)
        @torch.no_grad()
        def put_all_back() -> None:
            ModelTensors.of(module, root)  # shards are shown again, if FSDP has gathered them
            live.copy_to(model.tensors)
            for buffer, kept in transient:
                put_back(buffer, kept)

        def restore() -> None:
            try:
                put_all_back()
            except Exception as error:
                log.warning("merge: restoring the live weights failed half way and is tried again: %r", error)
                free_memory()
                try:
                    put_all_back()
                except Exception as again:
                    problem = f"the live weights are only partly restored: {again!r}"
                    raise HalfRestoredError(problem) from again

        try:
            yield model.tensors, restore
        except BaseException:
            settled(root)
            raise
        finally:
            restore()


def _in_host_memory(layout: Layout) -> AbstractContextManager[Arena]:
    return nullcontext(Arena.empty(layout))


class PythonState:
    """The present Python state of a module, its optimizers and schedulers, and of some callbacks.

    It consists of attributes, the containers and objects of the user's classes in them, metrics and
    generators: hooks count validations, keep the best one, step a scheduler or an environment.

    Args:
        module: the module, with all its submodules.
        optimizers: their groups and attributes are saved; the moments only change in a step.
        schedulers: the learning-rate schedulers.
        taking_part: objects that are called meanwhile; all of their state is saved.
        others: objects that are not called; only their attributes are saved.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Iterable[Optimizer] = (),
        schedulers: Iterable[Any] = (),
        taking_part: Iterable[Any] = (),
        others: Iterable[Any] = (),
    ) -> None:
        self._module, self._optimizers, self._schedulers = module, [*optimizers], [*schedulers]
        self._taking_part, self._others = [*taking_part], [*others]
        self.renew()

    def renew(self) -> None:
        """Saves the state as it is now, instead of the former one."""
        keeper = _Keeper(self._module)
        for optimizer in self._optimizers:
            keeper.keep_optimizer(optimizer)
        for scheduler in self._schedulers:
            keeper.keep(vars(scheduler), tensors=False)
        for part in self._module.modules():
            # A registered metric is reset before it is used, which replaces its tensors.
            keeper.keep(vars(part), tensors=not is_metric(part))
        for callback in self._taking_part:
            keeper.keep(vars(callback))
        keeper.restores += [_container_restore(vars(other)) for other in self._others]
        self._restores = keeper.restores

    def restore(self) -> None:
        """Restores all of it."""
        errors: list[BaseException] = []
        for restore in reversed(self._restores):
            try:
                restore()
            except BaseException as error:  # the rest is still restored
                errors.append(error)
        if errors:
            raise errors[0]


def is_metric(part: nn.Module, kind: str = "Metric") -> bool:
    """Whether a module is an instance of a torchmetrics class; torchmetrics may not be installed."""
    torchmetrics = sys.modules.get("torchmetrics")  # imported by the code that built a metric
    return torchmetrics is not None and isinstance(part, getattr(torchmetrics, kind))


def tracker_lengths(module: nn.Module, *taking_part: object) -> dict[nn.Module, int]:
    """How many metrics each ``MetricTracker`` of the module and of other objects has begun."""
    parts = _parts(module, *taking_part)
    return {part: part.n_steps for part in parts if is_metric(part, "MetricTracker")}  # type: ignore[misc]


def reset_metrics(
    module: nn.Module, *taking_part: object, trackers: Mapping[nn.Module, int] | None = None
) -> None:
    """Resets the torchmetrics of the module, and those that other objects hold.

    The past metrics of a ``MetricTracker`` stay.

    Args:
        module: the module.
        taking_part: the other objects.
        trackers: their lengths before the last validation. If it began a new metric, so will the next one;
            else that resets the newest. By default their present lengths.
    """
    before = tracker_lengths(module, *taking_part)
    past = set[nn.Module]()
    for tracker, length in before.items():
        count = length - (trackers is None or trackers.get(tracker) == length)
        for metric in list(tracker)[1 : 1 + count]:  # type: ignore[call-overload]  # the first is the pattern
            past.update(metric.modules())
    for part in _parts(module, *taking_part):
        if is_metric(part) and part not in past:
            part.reset()  # type: ignore[operator]
        if is_metric(part, "MetricCollection"):
            part._state_is_copy = True  # type: ignore[assignment]  # links its compute groups again


def _parts(module: nn.Module, *others: object) -> list[nn.Module]:
    """All modules in a module and in what other objects hold."""
    held = [value for owner in others for value in vars(owner).values()]
    held += [item for value in held if isinstance(value, (list, tuple)) for item in value]
    held += [item for value in held if isinstance(value, dict) for item in value.values()]
    owners = [module, *(value for value in held if isinstance(value, nn.Module))]
    return [part for owner in owners for part in owner.modules()]


def first_iterator(module: nn.Module) -> object | None:
    """An iterator that the module holds, if any: items taken from it can't be put back."""
    keeper = _Keeper(module)
    for part in module.modules():
        keeper.keep(vars(part), tensors=False)
    return next(iter(keeper.iterators), None)


class _Keeper:
    """Walks through everything that a module holds, and notes how to restore it.

    Args:
        module: its registered submodules, parameters and buffers are left out; others save those.
    """

    def __init__(self, module: nn.Module) -> None:
        self._empty: list[Any] = []
        self.restores: list[Restore] = [self._empty_again]
        self.iterators: list[object] = []
        registered = (*module.modules(), *module.parameters(), *module.buffers())
        self._seen = {id(owned) for owned in registered}

    def keep(self, value: Any, tensors: bool = True) -> None:
        """Notes how to restore a value and everything that it holds.

        Args:
            value: of any type; values that can't be restored are skipped.
            tensors: whether tensors are copied, too.
        """
        kind = type(value)
        if kind in _WITHOUT_PARTS or id(value) in self._seen:
            return
        if kind in _CONTAINERS and not value:  # as most that a module holds: a function for each is slow
            self._seen.add(id(value))
            self._empty.append(value)
            return
        if kind not in _CONTAINERS and (isinstance(value, nn.Parameter) or is_the_run(value)):
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            if tensors and value.numel() <= _PLAIN_TENSOR and not value.is_meta:
                self.restores.append(_tensor_restore(value.data))
        elif isinstance(value, nn.Module):
            self._keep_hidden(value)
        elif isinstance(value, np.ndarray):
            if value.size <= _PLAIN_TENSOR:
                self.restores.append(_array_restore(value))
        elif restore := generator_restore(value):
            self.restores.append(restore)
        elif _is_container(value):
            self._keep_container(value, tensors)
        elif isinstance(value, LRScheduler) or _is_of_users(value):  # chained schedulers hold others
            self._keep_object(value, tensors)
        elif isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            self.iterators.append(value)

    def _empty_again(self) -> None:
        for container in self._empty:
            if container:
                container.clear()

    def keep_optimizer(self, optimizer: Optimizer) -> None:
        """Notes how to restore an optimizer's groups; its moments only change when it steps."""
        for state in (optimizer.state, *optimizer.state.values()):
            self._seen.add(id(state))
            self.restores.append(_container_restore(state))
        self.keep(vars(optimizer), tensors=False)
        for group in optimizer.param_groups:
            rates = (value for value in group.values() if isinstance(value, Tensor))
            self.restores += [_tensor_restore(rate.data) for rate in rates]

    def _keep_container(self, value: Any, tensors: bool) -> None:
        if type(value) is not tuple:
            self.restores.append(_container_restore(value))
        if len(value) <= _LOOKED_INTO:
            for item in list(value.values()) if isinstance(value, dict) else list(value):
                self.keep(item, tensors)

    def _keep_object(self, value: Any, tensors: bool) -> None:
        if hasattr(value, "__dict__"):
            self.keep(vars(value), tensors)
        if slots := _slots(value):
            kept = {name: getattr(value, name) for name in slots if hasattr(value, name)}
            self.restores.append(partial(_set_slots, value, slots, kept))
            for item in kept.values():
                self.keep(item, tensors)

    def _keep_hidden(self, hidden: nn.Module) -> None:
        """Notes how to restore an unregistered module: a teacher, or a metric, in a list."""
        for part in hidden.modules():
            self._seen.add(id(part))
            self.keep(vars(part))
        for tensor in (*hidden.parameters(), *hidden.buffers()):
            if id(tensor) not in self._seen and tensor.numel() <= _PLAIN_TENSOR and not tensor.is_meta:
                self._seen.add(id(tensor))
                self.restores.append(_tensor_restore(tensor.data))


def _is_container(value: Any) -> bool:
    own = isinstance(value, (dict, list)) and type(value).__module__.partition(".")[0] not in _LIBRARIES
    return type(value) in _CONTAINERS or type(value).__name__ in _CONTAINERS_OF_LIGHTNING or own


def _is_of_users(value: Any) -> bool:
    """Whether a value is an object of the user's own class: an environment, a buffer of past steps."""
    if isinstance(value, SimpleNamespace):
        return True
    if not (hasattr(value, "__dict__") or _slots(value)) or isinstance(value, (*_NO_STATE, Dataset)):
        return False
    return type(value).__module__.partition(".")[0] not in _LIBRARIES


def _slots(value: Any) -> list[str]:
    """The names of an object's attributes that are stored in ``__slots__``."""
    return [
        name
        for kind in type(value).__mro__
        for name, member in vars(kind).items()
        if isinstance(member, MemberDescriptorType)
    ]


def _set_slots(value: Any, slots: list[str], kept: dict[str, Any]) -> None:
    for name in slots:
        if name in kept:
            object.__setattr__(value, name, kept[name])  # a frozen dataclass refuses the common way
        elif hasattr(value, name):
            object.__delattr__(value, name)


def _container_restore(container: Any) -> Restore:
    # Uses the methods of the basic type: a subclass may do more in its own, or refuse.
    kind = next(kind for kind in (dict, list, set, deque) if isinstance(container, kind))
    kept = dict(container) if kind is dict else kind(container)

    def restore() -> None:
        if isinstance(container, dict):  # not emptied first: a thread may be reading a module's attributes
            for key in [key for key in container if key not in kept]:
                dict.__delitem__(container, key)
            dict.update(container, kept)
            if list(container) == list(kept):
                return
        kind.clear(container)
        if kind in (dict, set):
            kind.update(container, kept)
        else:
            kind.extend(container, kept)  # type: ignore[union-attr]

    return restore


def _array_restore(array: np.ndarray) -> Restore:
    kept = array.copy()
    return lambda: np.copyto(array, kept) if array.flags.writeable else None


def _tensor_restore(tensor: Tensor) -> Restore:
    kept = tensor.clone()
    return lambda: put_back(tensor, kept)


def put_back(tensor: Tensor, kept: Tensor) -> None:
    """Gives a tensor its bits back."""
    # An expanded tensor can't be written to, but it can't have changed either. A tensor that was made in a
    # validation before the fit is an inference tensor.
    if not torch.equal(tensor, kept):
        with torch.inference_mode(tensor.is_inference()):
            tensor.copy_(kept)
