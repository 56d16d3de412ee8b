"""Sends a few scalars from the device and the other ranks to the host, without waiting for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache

import torch
from torch import Tensor

from merge_callback.sharding import Ranks

Read = Callable[[timedelta | None], list[float]]
"""Waits for the numbers, at most for the given time, and returns them.

Raises:
    RuntimeError: if they do not arrive, because another rank is gone or late.
"""


def send(numbers: Sequence[float | Tensor], are_own: bool = False) -> Read:
    """Sends this rank's numbers: one small copy to pinned memory, if any of them is on CUDA.

    Args:
        numbers: scalars; they may be overwritten afterwards.
        are_own: they are fp64, of no dimension, and never overwritten.
    """
    on_cuda = [n for n in numbers if isinstance(n, Tensor) and n.is_cuda]
    known = [n if isinstance(n, Tensor) and n.is_cuda else float(n) for n in numbers]
    if not on_cuda:
        return lambda within: known  # type: ignore[return-value]
    if not are_own:
        on_cuda = [n.to(on_cuda[0].device).reshape(()).double() for n in on_cuda]
    read_copy = _copy(on_cuda[0].view(1) if are_own and len(on_cuda) == 1 else torch.stack(on_cuda))

    def read(within: timedelta | None) -> list[float]:
        values = iter(read_copy(within))
        return [next(values) if isinstance(n, Tensor) else n for n in known]

    return read


def send_sum(numbers: Sequence[float | Tensor], ranks: Ranks, device: torch.device) -> Read:
    """Begins to sum the numbers over all ranks: one all-reduce in fp64.

    Args:
        numbers: this rank's scalars; they may be overwritten afterwards.
        ranks: the run's ranks; each has to send the same number of scalars.
        device: the device that training uses.
    """
    sums = _vector(numbers, device)
    wait = ranks.start_sum(sums)
    if sums.is_cuda:
        with torch.cuda.stream(_side_stream(sums.device)):  # so that training does not wait for other ranks
            wait()
            return _copy(sums)

    def read(within: timedelta | None) -> list[float]:
        wait() if within is None else wait(within)
        return sums.tolist()

    return read


def _vector(numbers: Sequence[float | Tensor], device: torch.device) -> Tensor:
    known = torch.tensor(
        [0.0 if isinstance(n, Tensor) else n for n in numbers], dtype=torch.float64, device="cpu"
    )
    if device.type == "cuda":
        known = known.pin_memory()  # else the copy would wait for the device
    vector = known.to(device, non_blocking=True)
    for i, n in enumerate(numbers):
        if isinstance(n, Tensor):
            vector[i].copy_(n.reshape(()), non_blocking=True)
    return vector


def _copy(vector: Tensor) -> Read:
    """Queues the copy of a CUDA vector beside the current stream; holds the vector until it is copied."""
    host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True, device="cpu")
    side = _side_stream(vector.device)
    side.wait_stream(torch.cuda.current_stream(vector.device))
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # who waits takes no core
    with torch.cuda.stream(side):  # so that the next kernels do not wait for the bus
        host.copy_(vector, non_blocking=True)
        copied.record(side)

    def read(within: timedelta | None, _kept: Tensor = vector) -> list[float]:
        end = None if within is None else time.monotonic() + within.total_seconds()
        while end is not None and not copied.query():  # type: ignore[no-untyped-call]
            if time.monotonic() > end:
                raise RuntimeError("the numbers of the other ranks did not arrive in time")
            time.sleep(0.001)
        copied.synchronize()
        return host.tolist()

    return read


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
