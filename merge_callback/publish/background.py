"""One job at a time beside training."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Does jobs in a thread of its own, in the order they are handed in, while training goes on.

    One job runs and none waits: handing in the next one waits for the one before, so that a storage slower
    than the interval slows the run down instead of filling the memory. A job has to catch its own exceptions.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Begins a job, once the one before is done."""
        self.drain()
        # A daemon: a process that ends after an exception must not wait for ranks that are gone.
        self._thread = threading.Thread(target=job, name="merge-background", daemon=True)
        self._thread.start()

    def drain(self, timeout: float | None = None) -> bool:
        """Waits until nothing is left to do, for ``timeout`` seconds at most; says whether that is so."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True
