"""Work on the elements of a tensor, shared out over a few threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

BLOCK = 1 << 15
"""Elements worked on at once, on a CPU: a dozen fp32 blocks stay in the second-level cache. It is also the
most that PyTorch leaves to the calling thread (its grain size): a larger block would start its own team of
OpenMP threads, which wait for each other at every operation (on two shared cores: 1.8 times as long). Where
PyTorch has a single thread, twice as many are a tenth faster: Python is called half as often."""

_THREADS = 4  # more would wait for Python between operations that take microseconds

_SHARE = 1 << 18  # elements below which starting a thread costs more than it saves

T = TypeVar("T")


def in_ranges(size: int, device: torch.device, job: Callable[[int, int], T]) -> list[T]:
    """Splits ``size`` elements into one range a thread and runs ``job(start, stop)`` on each of them.

    The threads are PyTorch's number at most; it is what it was before, for the caller and for all others. The
    split depends on it: what ``job`` returns or writes must not depend on where it begins.

    Returns:
        What each returned, in the order of the elements.
    """
    most = min(torch.get_num_threads(), _THREADS) if device.type == "cpu" else 1
    threads = max(1, min(most, size // _SHARE))
    share = math.ceil(size / threads / BLOCK) * BLOCK if threads > 1 else size
    inference = torch.is_inference_mode_enabled()  # this one and no_grad are the thread's own

    def run(start: int) -> T:
        with torch.inference_mode(inference), torch.no_grad():
            return job(start, min(start + share, size))

    if threads == 1:
        return [run(0)]
    with ThreadPoolExecutor(threads, thread_name_prefix="merge") as pool:
        return list(pool.map(run, range(0, size, share)))
