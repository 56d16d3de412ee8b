"""Times what a GPU does, by its own events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.gpu_check.machines import Machine

GIGA, TERA = 1e9, 1e12


def seconds(machine: Machine, run: Callable[[], object], repeats: int = 7, warm_up: int = 2) -> float:
    """The median time of a function.

    What is timed moves gigabytes, many times what the second-level cache holds, so that is not flushed.
    """
    for _ in range(warm_up):
        run()
    return statistics.median(once(machine, run) for _ in range(repeats))


def once(machine: Machine, run: Callable[[], object]) -> float:
    """The time from the moment the device begins with a function's work until it is done with it."""
    if machine.is_dry:
        start = time.perf_counter()
        run()
        return max(1e-9, time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def on_the_wall(machine: Machine, run: Callable[[], object]) -> float:
    """The time until a function has returned and the device is done."""
    machine.synchronize()
    start = time.perf_counter()
    run()
    machine.synchronize()
    return max(1e-9, time.perf_counter() - start)


def now(machine: Machine) -> float:
    """The seconds of a clock, once the device is done."""
    machine.synchronize()
    return time.perf_counter()


def median(values: list[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else float("nan")
