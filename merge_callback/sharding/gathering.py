"""Assembles whole tensors on the first rank, from the parts that each rank keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from merge_callback.sharding.pieces import Piece
from merge_callback.sharding.ranks import Ranks

_CHUNK = 1 << 26  # bytes per message


class Gathering:
    """Sends the parts of tensors to the first rank, tensor by tensor.

    Before each part a rank sends whether it has it. A rank that failed says so once and then sends nothing.
    The first rank goes on receiving even if it failed itself, so no rank waits forever.

    Args:
        pieces: which part each rank keeps, by rank and name; only this rank's if it is not the first.
        ranks: the run's ranks.
    """

    def __init__(self, pieces: Sequence[Mapping[str, Piece]], ranks: Ranks) -> None:
        self._pieces, self._ranks = pieces, ranks
        self._silent: set[int] = set()
        self._problem: Exception | None = None

    def tensors(self, parts: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[Tensor]:
        """The whole tensors on the first rank, empty ones elsewhere; see ``Sharding.gather``."""
        for name in names:
            part = self._tried(_flat, parts[name])
            if not self._ranks.is_first:
                self._send(self._pieces[0][name].numel, part)
                yield parts[name].new_empty(0)
            elif (whole := self._put_together(name, part, parts[name].dtype)) is not None:
                yield whole
        self._ranks.agree(self._problem)

    def _tried(self, make: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
        """The result of ``make``; ``None`` once a call has failed (out of memory, a device failure)."""
        if self._problem is None:
            try:
                return make(*args, **kwargs)
            except Exception as error:
                self._problem = error
        return None

    def _send(self, numel: int, part: Tensor | None) -> None:
        if numel == 0 or self._silent:
            return
        dist.send(torch.tensor([part is not None], device="cpu"), 0, group=self._ranks.group)
        if part is None:
            self._silent.add(self._ranks.rank)
            return
        bits = part.view(torch.uint8)
        for start in range(0, bits.numel(), _CHUNK):
            dist.send(bits[start : start + _CHUNK], 0, group=self._ranks.group)

    def _put_together(self, name: str, own: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        shape = self._pieces[0][name].whole
        if self._pieces[0][name].is_all:
            return None if own is None else own.view(shape)
        whole = self._tried(torch.empty, shape, dtype=dtype, device="cpu")
        for rank, kept in enumerate(self._pieces):
            part = own if rank == 0 else self._received(rank, kept[name].numel, dtype)
            if whole is not None and part is not None:
                kept[name].place(part, whole)
        return None if self._problem or self._silent else whole

    def _received(self, rank: int, numel: int, dtype: torch.dtype) -> Tensor | None:
        """A rank's part (uninitialised if that rank failed); ``None`` if there is no room for it here."""
        part = self._tried(torch.empty, numel, dtype=dtype, device="cpu")
        is_there = torch.tensor([False], device="cpu")
        if numel and rank not in self._silent:
            dist.recv(is_there, rank, group=self._ranks.group)
            if not is_there:
                self._silent.add(rank)
        if numel == 0 or rank in self._silent:
            return part
        size = numel * dtype.itemsize
        spare = torch.empty(min(size, _CHUNK) if part is None else 0, dtype=torch.uint8, device="cpu")
        for start in range(0, size, _CHUNK):
            stop = min(start + _CHUNK, size)
            chunk = spare[: stop - start] if part is None else part.view(torch.uint8)[start:stop]
            dist.recv(chunk, rank, group=self._ranks.group)
        return part


def _flat(part: Tensor) -> Tensor:
    return part.cpu().contiguous().view(-1)
