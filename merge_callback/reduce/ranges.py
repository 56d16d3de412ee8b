"""Splits work on the elements of a tensor over a few threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from merge_callback.reduce import threads

BLOCK = 1 << 15
"""Elements processed at once on a CPU: a dozen fp32 blocks stay in the second-level cache. It is also the
most that PyTorch processes in the calling thread (its grain size): a larger block would start a team of
OpenMP threads, which wait for each other at every operation (on two shared cores: 1.8 times as long). If
PyTorch has a single thread, blocks of twice the size are a tenth faster, since Python is called half as
often."""

_THREADS = 4  # more threads would wait for Python between operations that take microseconds

_SHARE = 1 << 18  # elements below which starting a thread costs more than it saves

S = TypeVar("S")
T = TypeVar("T")


def in_ranges(size: int, device: torch.device, job: Callable[[int, int], T]) -> list[T]:
    """Splits ``size`` elements into one range per thread and runs ``job(start, stop)`` on each range.

    There are at most as many threads as PyTorch uses, half as many in the background; that setting is not
    changed. The split depends on it, so the results of ``job`` must not depend on where a range begins.

    Returns:
        The results of all calls, in the order of the elements.
    """
    most = most_threads() if device.type == "cpu" else 1
    count = max(1, min(most, size // _SHARE))
    share = math.ceil(size / count / BLOCK) * BLOCK if count > 1 else size
    starts = range(0, size, share) if count > 1 else [0]
    return side_by_side(starts, lambda start: job(start, min(start + share, size)), count)


def most_threads() -> int:
    """As many threads as a reduction may take, up to 4."""
    return min(threads.most(), _THREADS)


def side_by_side(items: Collection[S], job: Callable[[S], T], count: int) -> list[T]:
    """Runs a job on each item, in so many threads; returns the results in the items' order."""
    if count == 1:
        with torch.no_grad():
            return [job(item) for item in items]
    # These modes are per thread.
    inference, yields = torch.is_inference_mode_enabled(), threads.is_yielding()

    def run(item: S) -> T:
        with torch.inference_mode(inference), torch.no_grad(), threads.yielding(yields):
            return job(item)

    with ThreadPoolExecutor(count, thread_name_prefix="merge") as pool:
        return list(pool.map(run, items))
