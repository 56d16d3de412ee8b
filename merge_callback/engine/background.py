"""A background thread that runs jobs one after the other."""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import NamedTuple

import torch

from merge_callback.recovery.deferred_signals import DeferredSignals
from merge_callback.reduce.threads import yielding
from merge_callback.snapshots.staging import recorded

log = logging.getLogger(__name__)


class Done:
    """Whether a job is done; set once.

    ``threading.Event`` is locked by Python code for moments in every call. A Ctrl-C that comes in one of them
    leaves it locked, and then the background waits for ever to set it, and the run for the background. The
    queue in this one is C code, between whose instructions no signal is handled.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def is_set(self) -> bool:
        """Whether the job is done."""
        return self._is_set

    def set(self) -> None:
        """Notes that the job is done."""
        self._is_set = True
        self._wake.put(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for the job, ``timeout`` seconds at most; returns whether it is done."""
        if not self._is_set:
            with suppress(queue.Empty):
                self._wake.get(timeout=timeout)
            if self._is_set:
                self._wake.put(None)  # for whoever else waits
        return self._is_set


class _Turns:
    """Has threads take short turns with the lock of the interpreter while a job runs, in any `Background`.

    By default a thread that wants the lock waits 5 ms before another that runs Python gives it up: training
    would wait that long after every operation of PyTorch. The setting is the process's; afterwards it is as
    it was.
    """

    _SECONDS = 1e-3

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs, self._before = 0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._jobs == 0:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(self._before, self._SECONDS))
            self._jobs += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._jobs -= 1
            if self._jobs == 0:
                sys.setswitchinterval(self._before)


_turns = _Turns()


class _Job(NamedTuple):
    work: Callable[[], object]
    ready: torch.cuda.Event | None  # the device work that has to finish first
    done: Done


class Background:
    """Runs jobs in a thread of its own, in the order they are submitted, while training goes on.

    Passes over the weights leave training half of the cores, and on Linux they run at a low priority. On CUDA
    a job runs on a stream of its own, after the work that was queued on the device when the job was
    submitted, and it is done once the device has finished it, too. A job may submit others. If one raises,
    the exception is logged. A signal whose handler raises, at any instruction of a call, leaves the job
    submitted or not, and a later call waits for what was.

    Args:
        device: the device that training uses.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._jobs: deque[_Job] = deque()  # that are not done; the first of them is being run
        self._working = threading.Lock()  # held by the thread that runs jobs, which no signal interrupts
        self._worker: threading.Thread | None = None

    def submit(self, work: Callable[[], object]) -> Done:
        """Submits a job without waiting; what it returns is set when the job is done.

        If the system can't start another thread, the caller runs the job at once.
        """
        ready = (
            None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()
        )
        job = _Job(work, ready, Done())
        self._jobs.append(job)
        self._start()
        return job.done

    def drain(self, timeout: float | None = None) -> bool:
        """Waits until no job is left, for ``timeout`` seconds at most; returns whether none is left.

        A job that calls this does not wait for itself.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_current and (last := self._last()) and not last.is_set():
            self._start()  # a signal may have kept ``submit`` from it
            if not last.wait(None if end is None else max(0.0, end - time.monotonic())):
                return False
        return True

    @property
    def is_current(self) -> bool:
        """Whether this is called by a job."""
        return threading.current_thread() is self._worker

    def _last(self) -> Done | None:
        try:
            return self._jobs[-1].done
        except IndexError:
            return None

    def _start(self) -> None:
        """Has a thread run the jobs, unless one does."""
        if self._working.locked():  # it looks for jobs once more after it has let go
            return
        # A daemon: a process that ends after an exception must not wait for ranks that are gone.
        thread = threading.Thread(target=self._run, name="merge-background", daemon=True)
        try:
            # ``start`` holds a lock of all threads: interrupted, it would keep later ones from starting.
            with DeferredSignals():
                thread.start()
        except RuntimeError as error:
            log.warning("merge: could not start a background thread, snapshots block training: %s", error)
            self._run()

    def _run(self) -> None:
        """Runs the jobs that there are, if no other thread does."""
        while self._jobs and self._working.acquire(blocking=False):
            self._worker = threading.current_thread()
            try:
                while self._jobs:
                    self._do(self._jobs[0])
                    self._jobs.popleft()
            finally:
                self._worker = None
                self._working.release()

    def _do(self, job: _Job) -> None:
        try:
            self._work(job)
        except BaseException:
            log.exception("merge: a job in the background failed; training goes on")
        finally:
            job.done.set()

    def _work(self, job: _Job) -> None:
        with ExitStack() as stack:
            stack.enter_context(yielding())
            stack.enter_context(_turns)
            stack.enter_context(torch.no_grad())  # like the device and the stream, each thread has its own
            if self._stream is not None and job.ready is not None:
                stack.enter_context(torch.cuda.device(self._stream.device))
                stack.enter_context(torch.cuda.stream(self._stream))
                stack.callback(_wait_for, self._stream)
                self._stream.wait_event(job.ready)
            job.work()


def _wait_for(stream: torch.cuda.Stream) -> None:
    recorded(stream).synchronize()  # not stream.synchronize(), which would take a core meanwhile
