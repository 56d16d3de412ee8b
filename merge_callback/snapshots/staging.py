"""The ways between a GPU and host memory: chunks of pinned memory, through which copies are fast.

From pageable memory and to it, CUDA copies at a fraction of the bus, and whoever asks for it waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from merge_callback.sharding.live import overwrite

_CHUNK = 1 << 26
"""Bytes on the way at once, twice: enough for the bus, and all the pinned memory a window ever takes."""

_ALIGNED = 16  # bytes: each tensor in a chunk begins at a multiple of them

Fill = Callable[[Tensor, int, int], object]
"""Writes some elements of a tensor (their room, the first, one past the last) in its dtype."""


def has_room(device: torch.device, nbytes: int) -> bool:
    """Whether a GPU has room for so many bytes besides the most that training has ever taken on it.

    What the allocator has reserved counts, used or not: it may be in pieces.
    """
    free, total = torch.cuda.mem_get_info(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(
        device
    )  # torch 2.6 has none
    limit = min(free + torch.cuda.memory_reserved(device), int(share * total))
    return torch.cuda.max_memory_reserved(device) + nbytes + nbytes // 16 <= limit


class ToHost:
    """Reads buffers out of device memory, through two chunks of pinned memory that are allocated once."""

    def __init__(self) -> None:
        self._slots: list[Tensor] = []

    def chunks(self, buffer: Tensor) -> Iterator[Tensor]:
        """The bytes of a buffer in host memory, in order; each chunk holds until the next one is asked for.

        While one chunk is used, the next one is on its way, on the current stream. Nothing is copied of a
        buffer that lies in host memory.

        Args:
            buffer: 1-D ``uint8``, on any device.
        """
        if buffer.device.type != "cuda":
            yield buffer.cpu()
            return
        if not self._slots:
            self._slots = _pinned()
        pieces = torch.split(buffer, _CHUNK)
        arrived = [_send(piece, slot) for piece, slot in zip(pieces[:1], self._slots, strict=False)]
        for index, piece in enumerate(pieces):
            if index + 1 < len(pieces):
                arrived.append(_send(pieces[index + 1], self._slots[(index + 1) % 2]))
            arrived[index].synchronize()
            yield self._slots[index % 2][: piece.numel()]

    def copy(self, buffer: Tensor, out: Tensor) -> None:
        """Copies a buffer from any device to host memory."""
        begin = 0
        for chunk in self.chunks(buffer):
            out[begin : begin + chunk.numel()].copy_(chunk)
            begin += chunk.numel()


def fetch(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copies tensors from a GPU to host memory, casting there; waits until they have arrived.

    Args:
        pairs: a contiguous tensor in host memory, and one of the same shape on a device.
    """
    with _own_chunks() as chunks:
        for target, source in pairs:
            out, given = target.view(-1), source.reshape(-1)
            for start, stop in _ranges(out):
                part = chunks.room(out[start:stop], source.device)
                part.copy_(given[start:stop], non_blocking=True)
                chunks.land(part, out[start:stop])
        chunks.empty()


def send(parts: Iterable[tuple[Tensor, Fill]]) -> None:
    """Overwrites live tensors on a GPU with what is made in host memory, in the order of the current stream.

    Args:
        parts: a tensor in any memory format, and a function that makes its values.
    """
    with _own_chunks() as chunks:
        for tensor, fill in parts:
            is_flat = tensor.is_contiguous() and not tensor.is_inference()
            whole = tensor if is_flat else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            flat = whole.view(-1)
            for start, stop in _ranges(flat):
                part = chunks.room(flat[start:stop], tensor.device)
                fill(part, start, stop)
                flat[start:stop].copy_(part, non_blocking=True)
            if whole is not tensor:
                overwrite(tensor, whole)
        chunks.leave()


def copying(source: Tensor) -> Fill:
    """Has a live tensor overwritten with one in host memory."""
    flat = source.reshape(-1)

    def fill(part: Tensor, start: int, stop: int) -> None:
        part.copy_(flat[start:stop])

    return fill


class _Slot:
    """A chunk of pinned memory, and what is on its way in it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.used, self.device = memory, 0, torch.device("cpu")
        self.is_open = False  # whether something is on its way that no event is recorded after
        self.event: torch.cuda.Event | None = None
        self.landings: list[tuple[Tensor, Tensor]] = []

    def leave(self) -> None:
        """Notes what has to be over before it is used again."""
        if self.is_open:
            self.event, self.is_open = recorded(torch.cuda.current_stream(self.device)), False

    def clear(self) -> None:
        """Waits until nothing is under way, and hands out what has arrived."""
        if self.event is not None:
            self.event.synchronize()
        for part, target in self.landings:
            target.copy_(part)
        self.used, self.event, self.landings = 0, None, []


class _Chunks(threading.local):
    """Two chunks in turn, of one thread: the background has others than training."""

    def __init__(self) -> None:
        self._slots: list[_Slot] = []

    def room(self, like: Tensor, device: torch.device) -> Tensor:
        """Room in pinned memory for a 1-D tensor of at most a chunk, on its way to or from a device."""
        if not self._slots:
            self._slots = [_Slot(memory) for memory in _pinned()]
        slot = self._slots[0]
        if slot.used and (slot.used + like.nbytes > _CHUNK or slot.device != device):
            slot.leave()
            self._slots.reverse()
            slot = self._slots[0]
            slot.clear()
        slot.device, slot.is_open = device, True
        start, stop = slot.used, slot.used + like.nbytes
        slot.used = -(-stop // _ALIGNED) * _ALIGNED
        return slot.memory[start:stop].view(like.dtype)

    def land(self, part: Tensor, target: Tensor) -> None:
        """Notes where something belongs that is on its way to the host."""
        self._slots[0].landings.append((part, target))

    def leave(self) -> None:
        """Ends the chunk in use; what is on its way in it need not be over."""
        for slot in self._slots[:1]:
            slot.leave()

    def empty(self) -> None:
        """Waits for all that is on its way."""
        self.leave()
        for slot in reversed(self._slots):
            slot.clear()

    def drop(self) -> None:
        """Forgets what is on its way, once it is over: an exception has cut it off."""
        for slot in self._slots:
            slot.leave()
            slot.landings = []
            slot.clear()


_chunks = _Chunks()


@contextmanager
def _own_chunks() -> Iterator[_Chunks]:
    with torch.inference_mode(False), torch.no_grad():
        try:
            yield _chunks
        except BaseException:
            _chunks.drop()
            raise


def recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event that is over when all that a stream has to do by now is; who waits for it takes no core."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _pinned() -> list[Tensor]:
    # One by one: the allocator rounds each up to a power of 2.
    with torch.inference_mode(False):
        return [torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True, device="cpu") for _ in range(2)]


def _ranges(flat: Tensor) -> Iterator[tuple[int, int]]:
    """The elements of a tensor, in parts of at most a chunk."""
    most = _CHUNK // flat.itemsize
    return ((start, min(start + most, flat.numel())) for start in range(0, flat.numel(), most))


def _send(piece: Tensor, slot: Tensor) -> torch.cuda.Event:
    slot[: piece.numel()].copy_(piece, non_blocking=True)
    return recorded(torch.cuda.current_stream(piece.device))
