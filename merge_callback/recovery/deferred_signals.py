"""Ctrl-C and other signals wait while the live weights are somebody else's, or half written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import Any, ClassVar

Handler = Callable[[int, FrameType | None], Any]


class DeferredSignals:
    """Within, the handlers of signals are not called; what was sent meanwhile reaches them right afterwards.

    These handlers run between any two instructions of the main thread. Python's own, of Ctrl-C, raises there;
    Lightning's, of a cluster's requeue, saves a checkpoint. This is meant for short parts, like the copy
    of all weights: nothing that takes long in them can be interrupted. ``let_through`` is for a long middle::

        with DeferredSignals() as signals, other_weights():
            with signals.let_through():
                validate()

    There a handler is called at once, within what ``around_handlers`` was given. If it raises, further
    signals wait again from that very instruction on, so that a second Ctrl-C can't get into what the first
    one has begun: putting things back. ``has_raised`` tells its exception from those of what is interrupted.

    All signals with a handler in Python are deferred. One without (SIGTERM, outside of Lightning) ends the
    process, and nobody sees its weights again. In threads other than the main one nothing is raised, and
    nothing is done here. Uses may be nested.
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
            except BaseException:  # raised by the handler of one that is not deferred yet
                self._hand_back()
                raise
            self._entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self in self._entered:
            self._entered.remove(self)
        with ExitStack() as stack:  # calls all of them, though one raises
            stack.callback(self._hand_back)
            self._is_over = True  # from now on a signal goes straight to its handler
            for number in reversed(self._pending):
                stack.callback(self._call, number, None)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Is the handler of all signals meanwhile."""
        if self._is_over:  # a library has installed a handler that calls this one
            self._call(number, frame)
            return
        if number not in self._pending:
            self._pending.append(number)
        if self._is_open:
            self._deliver(frame)

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Within, handlers are called as ever, until one raises.

        No instruction between here and there has to be safe: who raises has closed this before.
        """
        self._deliver(None)
        try:
            yield
        finally:
            self._is_open = False

    @classmethod
    @contextmanager
    def around_handlers(cls, context: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
        """Within, a handler that is let through by the innermost use finds itself in this context."""
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
        """Whether an exception is a handler's: meant for the run, whatever was interrupted."""
        return error is cls._raised

    def _deliver(self, frame: FrameType | None) -> None:
        """Calls the handlers of what is pending; stays open where none raises."""
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
