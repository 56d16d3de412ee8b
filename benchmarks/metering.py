"""Seconds, messages and bytes of the callback's own work in a rank, stage by stage."""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Event:
    """One snapshot, say: what each of its stages took and sent, without the stages within it."""

    name: str
    seconds: Counter[str] = field(default_factory=Counter)
    payload: Counter[str] = field(default_factory=Counter)
    wire: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def stall(self) -> float:
        return sum(self.seconds.values())


@dataclass
class _Frame:
    event: Event
    sender: str
    start: float
    sent: int
    inner_seconds: float = 0.0
    inner_wire: int = 0


class Meter:
    """Times the stages of events; where asked to, counts what they send as well, which takes its time.

    A thread's events are its own, but the sockets are everybody's: where threads send at the same time,
    ``wire`` does not tell which of them did.

    ``payload`` is what this rank hands to collectives: its part of a gather, its summand, what it is the
    source of. ``wire`` is what its TCP sockets send meanwhile, gloo's headers and forwarding included.
    """

    def __init__(self, count: bool) -> None:
        self.count = count
        self.events: list[Event] = []
        self._thread = threading.local()

    @property
    def _frames(self) -> list[_Frame]:
        if not hasattr(self._thread, "frames"):
            self._thread.frames = []
        frames: list[_Frame] = self._thread.frames
        return frames

    @contextmanager
    def event(self, name: str) -> Iterator[None]:
        event = Event(name)
        self.events.append(event)
        with self._frame(event, "other", "other"):
            yield

    @contextmanager
    def stage(self, name: str, sends: bool = True) -> Iterator[None]:
        """A part of an event; what it sends is the enclosing stage's unless it ``sends`` for itself."""
        if not self._frames:
            yield
            return
        outer = self._frames[-1]
        with self._frame(outer.event, name, name if sends else outer.sender):
            yield

    def wrap(self, owner: Any, name: str, stage: str, sends: bool = True) -> None:
        """Makes a function a stage wherever it is called within an event."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def metered(*args: Any, **kwargs: Any) -> Any:
            with self.stage(stage, sends):
                return inner(*args, **kwargs)

        setattr(owner, name, metered)

    def note(self, collective: str, size: int) -> None:
        frame = self._frames[-1]
        if frame.sender != "validation":  # the module's own messages
            frame.event.calls[collective] += 1
            frame.event.payload[frame.sender] += size

    @contextmanager
    def _frame(self, event: Event, name: str, sender: str) -> Iterator[None]:
        messages = _Messages(self) if self.count and not self._frames else nullcontext()
        frame = _Frame(event, sender, time.perf_counter(), bytes_sent() if self.count else 0)
        self._frames.append(frame)
        try:
            with messages:
                yield
        finally:
            self._frames.pop()
            seconds = time.perf_counter() - frame.start
            wire = bytes_sent() - frame.sent if self.count else 0
            event.seconds[name] += seconds - frame.inner_seconds
            event.wire[sender] += wire - frame.inner_wire
            if self._frames:
                self._frames[-1].inner_seconds += seconds
                self._frames[-1].inner_wire += wire


class _Messages(TorchDispatchMode):
    """Sees every collective of this thread, below Python's own functions, whoever calls it."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__.strip("_")
            self.meter.note(name, _payload(name, args))
        return func(*args, **(kwargs or {}))


def _payload(name: str, args: Sequence[Any]) -> int:
    """Bytes of this rank's that it hands over. All groups here hold all ranks."""
    if name in ("recv", "barrier") or (name == "broadcast" and args[2] != dist.get_rank()):
        return 0
    return _nbytes(args[1] if name in ("allgather", "gather", "scatter") else args[0])


def _nbytes(given: Any) -> int:
    return sum(map(_nbytes, given)) if isinstance(given, (list, tuple)) else given.nbytes


def bytes_sent() -> int:
    """What this process's TCP sockets have sent so far: gloo's."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(descriptor))) as each:
                    info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 208)
                    total += int.from_bytes(info[200:208], "little")  # tcpi_bytes_sent
    return total
