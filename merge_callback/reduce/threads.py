"""How many threads a pass takes: as many as PyTorch would, or fewer while training needs the cores."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_NICE = 10  # a tenth of the share that training's threads have of a core


class _Mode(threading.local):
    yields = False


_mode = _Mode()


@contextmanager
def yielding(on: bool = True) -> Iterator[None]:
    """In this context, of this thread, passes take at most half of the cores."""
    before, _mode.yields = _mode.yields, on
    try:
        yield
    finally:
        _mode.yields = before


def is_yielding() -> bool:
    """Whether this thread has to leave training half of the cores."""
    return _mode.yields


def most() -> int:
    """The most threads that a pass may take here."""
    threads = torch.get_num_threads()
    return max(1, threads // 2) if _mode.yields else threads


def at_low_priority(job: Callable[..., object], *arguments: object) -> None:
    """Runs a job at a lower priority than the process has, for as long as the present thread lives.

    Only Linux has priorities of single threads; elsewhere this is a call like any other. It is for threads
    that run no Python: one that waits for a core with the lock of the interpreter would hold training up.
    """
    if sys.platform == "linux":
        os.nice(_NICE)
    job(*arguments)
