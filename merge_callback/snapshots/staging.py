"""The way of a snapshot from a device to host memory, in the background."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 26
"""Bytes on the way at once, twice: enough for the bus, and all the pinned memory a window ever takes."""


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
        if not self._slots:  # one by one: the allocator rounds each up to a power of 2
            self._slots = [
                torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True, device="cpu") for _ in range(2)
            ]
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


def _send(piece: Tensor, slot: Tensor) -> torch.cuda.Event:
    slot[: piece.numel()].copy_(piece, non_blocking=True)
    event: torch.cuda.Event = torch.cuda.current_stream(piece.device).record_event()
    return event
