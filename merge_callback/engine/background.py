"""A background thread that runs jobs one after the other."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)


class _Job(NamedTuple):
    work: Callable[[], object]
    ready: torch.cuda.Event | None  # the device work that has to finish first
    done: threading.Event


class Background:
    """Runs jobs in a thread of its own, in the order they are submitted, while training goes on.

    On CUDA a job runs on a stream of its own, after the work that was queued on the device when the job was
    submitted, and it is done once the device has finished it, too. A job may submit others. If one raises,
    the exception is logged.

    Args:
        device: the device that training uses.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._jobs: deque[_Job] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._last: threading.Event | None = None

    def submit(self, work: Callable[[], object]) -> threading.Event:
        """Submits a job without waiting; the returned event is set when the job is done.

        If the system can't start another thread, the caller runs the job at once.
        """
        ready = (
            None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()
        )
        job = _Job(work, ready, threading.Event())
        with self._lock:
            if self._thread is None:
                self._thread = self._started()
            if self._thread is not None:
                self._jobs.append(job)
                self._last = job.done
                return job.done
        self._do(job)
        return job.done

    def drain(self, timeout: float | None = None) -> bool:
        """Waits until no job is left, for ``timeout`` seconds at most; returns whether none is left.

        A job that calls this does not wait for itself.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_current and (last := self._last) and not last.is_set():
            if not last.wait(None if end is None else max(0.0, end - time.monotonic())):
                return False
        return True

    @property
    def is_current(self) -> bool:
        """Whether this is called by a job."""
        return threading.current_thread() is self._thread

    def _started(self) -> threading.Thread | None:
        # A daemon: a process that ends after an exception must not wait for ranks that are gone.
        thread = threading.Thread(target=self._run, name="merge-background", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            log.warning("merge: could not start a background thread, snapshots block training: %s", error)
            return None
        return thread

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
            self._do(job)

    def _do(self, job: _Job) -> None:
        try:
            self._work(job)
        except BaseException:
            log.exception("merge: a job in the background failed; training goes on")
        finally:
            job.done.set()

    def _work(self, job: _Job) -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())  # like the device and the stream, each thread has its own
            if self._stream is not None and job.ready is not None:
                stack.enter_context(torch.cuda.device(self._stream.device))
                stack.enter_context(torch.cuda.stream(self._stream))
                stack.callback(self._stream.synchronize)
                self._stream.wait_event(job.ready)
            job.work()
