"""Loggers and callbacks that can be read as usual, but that nothing is written to."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger

_READS = ("get", "is_", "has_")  # beginnings of the names of methods that only return something
_VALUES = (str, bytes, int, float, complex, bool, type(None), os.PathLike, Tensor)
_SAVING = {"on_save_checkpoint", "on_load_checkpoint", "on_exception"}


def quiet_logger(logger: Logger) -> Logger:
    """A logger of the same class, with the same folder, name and version, whose methods write nothing.

    Its ``experiment`` returns the values of the logger's own, and ignores every call.
    """
    kind = type(logger)
    own: dict[str, Any] = {
        name: nothing
        for name in dir(kind)
        if not name.startswith(("_", *_READS)) and callable(getattr(kind, name, None))
    }
    if hasattr(kind, "experiment"):
        own["experiment"] = property(lambda _: QuietObject(lambda: logger.experiment))  # type: ignore[attr-defined]
    quiet: Logger = object.__new__(type(kind.__name__, (kind,), {**own, "__module__": kind.__module__}))
    vars(quiet).update({name: value for name, value in vars(logger).items() if name not in own})
    return quiet


class QuietObject:
    """A stand-in for an object: it returns its values, and copies of its containers, but calls do nothing.

    Only methods whose names begin with ``get``, ``is_`` or ``has_`` are really called.

    Args:
        present: returns the object; not called before something is read.
    """

    def __init__(self, present: Callable[[], Any] = lambda: None) -> None:
        object.__setattr__(self, "_present", present)

    def __getattr__(self, name: str) -> Any:
        present = object.__getattribute__(self, "_present")()
        value = getattr(present, name, None) if name.startswith("__") else getattr(present, name, self)
        if name.startswith(_READS) and value is not self:
            return value
        return _readable(value)

    def __setattr__(self, name: str, value: Any) -> None: ...

    def __getitem__(self, key: Any) -> Any:
        try:
            return _readable(object.__getattribute__(self, "_present")()[key])
        except Exception:
            return QuietObject()

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __delitem__(self, key: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> QuietObject:
        """Does nothing."""
        return QuietObject()

    def __enter__(self) -> QuietObject:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return object.__getattribute__(self, "_present")() is not None


def _readable(value: Any) -> Any:
    if isinstance(value, (*_VALUES, QuietObject)):
        return value
    if type(value) in (list, tuple, set, dict):
        return copy.copy(value)
    return QuietObject(lambda: value)


@contextmanager
def silenced(callbacks: Sequence[Callback], base: type[Callback]) -> Iterator[None]:
    """In this context the callbacks' hooks of ``base`` are not called, except those that save and load."""
    hooks = [name for name in dir(base) if name.startswith("on_") and name not in _SAVING]
    with ExitStack() as stack:
        for callback in callbacks:
            own: dict[str, Any] = vars(callback)
            stack.callback(_give_back, own, hooks, {name: own[name] for name in hooks if name in own})
            own.update(dict.fromkeys(hooks))  # no functions: the profiler would time them within our own hook
        yield


def _give_back(own: dict[str, Any], hooks: Sequence[str], kept: dict[str, Any]) -> None:
    for name in hooks:
        own.pop(name, None)
    own.update(kept)


def nothing(*_: Any, **__: Any) -> None:
    """Accepts every call, and does nothing."""
