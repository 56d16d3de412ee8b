"""Work on a model's tensors, side by side in processes that share its mapped files."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context

import torch
from torch import Tensor

_MOST = 8  # beyond that, the memory is busy

_job: Callable[[str], object] | None = None  # handed over by the fork


def available() -> int:
    """How many processes this one may keep busy: 1 if it can't fork."""
    if "fork" not in get_all_start_methods() or not hasattr(os, "sched_getaffinity"):
        return 1
    return min(_MOST, len(os.sched_getaffinity(0)))


def each(job: Callable[[str], object], sizes: Mapping[str, int], workers: int) -> Generator[str, None, None]:
    """Runs ``job`` on every name, the largest first; yields the names in their order as they are done.

    Not threads: the operations on one block take microseconds, and threads would wait for the interpreter.

    Args:
        job: writes its results to shared memory.
        sizes: what it is run on, and how large each is.
        workers: processes; with 1 it is run in this one. More are forked: this one should not have threads.

    Raises:
        OSError: if one of the processes was killed.
        Exception: the first one that ``job`` raised.
    """
    global _job
    if workers == 1 or len(sizes) == 1:
        for name in sizes:
            job(name)
            yield name
        return
    _job = job
    pool = ProcessPoolExecutor(workers, get_context("fork"))
    try:
        # The largest first: else one of them is left at the end, and the other processes wait for it.
        order = sorted(sizes, key=lambda name: -sizes[name])
        done = {name: pool.submit(_run, name) for name in order}
        for name in sizes:
            done[name].result()
            yield name
    except BrokenProcessPool as error:
        raise OSError(f"a process was killed while it merged ({error}); is there memory enough?") from error
    finally:
        pool.shutdown(cancel_futures=True)
        _job = None


def numbers(names: Iterable[str]) -> dict[str, Tensor]:
    """An fp64 number for each name, 0 at first, that the processes of ``each`` can set."""
    known = list(names)
    shared = torch.zeros(len(known), dtype=torch.float64)
    shared.share_memory_()  # type: ignore[no-untyped-call]
    return dict(zip(known, shared, strict=True))


def _run(name: str) -> None:
    assert _job is not None
    _job(name)
