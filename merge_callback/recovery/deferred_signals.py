"""Defers Ctrl-C and other signals while the live weights are replaced or half written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import Any, ClassVar

Handler = Callable[[int, FrameType | None], Any]


class DeferredSignals:
    """In this context signal handlers are not called; pending signals reach them right afterwards.

    Handlers run between any two instructions of the main thread. Python's handler of Ctrl-C raises there;
    Lightning's handler of a cluster's requeue saves a checkpoint. The context is meant for short parts, like
    the copy of all weights, because nothing in it can be interrupted. ``let_through`` is for a long middle::

        with DeferredSignals() as signals, other_weights():
            with signals.let_through():
                validate()

    There a handler is called at once, inside the context given to ``around_handlers``. If it raises, further
    signals are deferred again from that very instruction on, so that a second Ctrl-C can't interrupt the
    restoring that the first one has started. ``has_raised`` tells a handler's exception from others.

    All signals with a handler in Python are deferred. A signal without one (SIGTERM, outside of Lightning)
    ends the process, and nobody sees its weights again. Python calls handlers only in the main thread, so in
    other threads the context does nothing. Uses may be nested.
    """

    _entered: ClassVar[list[DeferredSignals]] = []  # in the main thread, the innermost one last
    _raised: ClassVar[BaseException | None] = None  # by a handler, most recently

    def __init__(self) -> None:
        self._around: Callable[[], AbstractContextManager[object]] = nullcontext
        self._handlers: dict[int, Handler] = {}
        self._pending: list[int] = []
        self._is_open = self._is_over = False

    def __enter__(self) -> DeferredSignals:
        if threading.current_thread() is threading.main_thread():
            try:
                for number in signal.valid_signals():
                    if callable(handler := signal.getsignal(number)):
                        self._handlers[number] = handler
                        signal.signal(number, self)
            except BaseException:  # raised by the handler of a signal that is not deferred yet
                self._hand_back()
                raise
            self._entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self in self._entered:
            self._entered.remove(self)
        with ExitStack() as stack:  # calls all of them, even if one raises
            stack.callback(self._hand_back)
            self._is_over = True  # from now on a signal goes straight to its handler
            for number in reversed(self._pending):
                stack.callback(self._call, number, None)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler of all signals in the context."""
        if self._is_over:  # a library has installed a handler that calls this one
            self._call(number, frame)
            return
        if number not in self._pending:
            self._pending.append(number)
        if self._is_open:
            self._deliver(frame)

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """In this context handlers are called as usual, until one raises.

        A handler's exception can't leave it open: it is closed before the handler is called.
        """
        self._deliver(None)
        try:
            yield
        finally:
            self._is_open = False

    @classmethod
    @contextmanager
    def around_handlers(cls, context: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
        """In this context the innermost use calls the handlers that it lets through inside ``context``."""
        innermost = cls._entered[-1:] if threading.current_thread() is threading.main_thread() else []
        for signals in innermost:
            signals._around = context
        try:
            yield
        finally:
            for signals in innermost:
                signals._around = nullcontext

    @classmethod
    def has_raised(cls, error: BaseException) -> bool:
        """Whether a handler raised this exception: then it is meant for the run, whatever was interrupted."""
        return error is cls._raised

    def _deliver(self, frame: FrameType | None) -> None:
        """Calls the handlers of pending signals; stays open if none raises."""
        self._is_open = False
        while self._pending:
            number = self._pending.pop(0)
            with self._around():
                self._call(number, frame)
        self._is_open = True
        if self._pending:  # came between the last two lines
            self._deliver(frame)

    def _call(self, number: int, frame: FrameType | None) -> None:
        try:
            self._handlers[number](number, frame)
        except BaseException as error:
            DeferredSignals._raised = error
            raise

    def _hand_back(self) -> None:
        self._is_over = True
        for number, handler in self._handlers.items():
            if signal.getsignal(number) is self:
                signal.signal(number, handler)
