"""Parts of tensors: which elements of the whole a rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: ``shape`` elements from index ``offset`` on."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.shape)

    def of(self, whole: Tensor) -> Tensor:
        """The box of a whole tensor (a view)."""
        for dim, (start, length) in enumerate(zip(self.offset, self.shape, strict=True)):
            whole = whole.narrow(dim, start, length)
        return whole


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: boxes whose elements, one box after the other, are the part's.

    One box is what DTensor shards and slices of rows are. Several make up a range of a flattened tensor, as
    FSDP1 shards it: they are in the order of that range, which begins at element ``start``. A piece without
    boxes is empty.
    """

    whole: tuple[int, ...]
    boxes: tuple[Box, ...]
    start: int | None = None

    @classmethod
    def all_of(cls, shape: Sequence[int]) -> Piece:
        """All of a tensor of this shape."""
        return cls.box(shape, [0] * len(shape), shape)

    @classmethod
    def box(cls, whole: Sequence[int], offset: Sequence[int], shape: Sequence[int]) -> Piece:
        """One box of a tensor of shape ``whole``; it may be empty."""
        box = Box(tuple(offset), tuple(shape))
        return cls(tuple(whole), (box,) if box.numel else ())

    @classmethod
    def flat(cls, whole: Sequence[int], start: int, stop: int) -> Piece:
        """Elements ``start`` to ``stop`` of the flattened tensor."""
        return cls(tuple(whole), tuple(_boxes(tuple(whole), start, stop)), start)

    @property
    def numel(self) -> int:
        """Elements in the piece."""
        return sum(box.numel for box in self.boxes)

    @property
    def rows(self) -> int:
        """Slices along the first dimension of what a rank holds in memory: a box, or a flat range."""
        if self.start is not None or not self.boxes:
            return self.numel
        return self.boxes[0].shape[0] if self.whole else 1

    def of_rows(self, start: int, stop: int) -> Piece:
        """The piece that some of its rows make up."""
        if self.start is not None:
            return Piece.flat(self.whole, self.start + start, self.start + stop)
        if not self.whole:
            return self if stop > start else Piece((), ())
        box = self.boxes[0]
        offset = (box.offset[0] + start, *box.offset[1:])
        return Piece.box(self.whole, offset, (stop - start, *box.shape[1:]))

    @property
    def is_all(self) -> bool:
        """Whether this is the whole tensor."""
        return self.numel == math.prod(self.whole)

    def place(self, part: Tensor, whole: Tensor) -> None:
        """Writes the piece's elements, ``part`` in any shape, to their places in the whole tensor."""
        start, flat = 0, part.reshape(-1)
        for box in self.boxes:
            box.of(whole).copy_(flat[start : start + box.numel].view(box.shape))
            start += box.numel


def split_rows(sizes: Sequence[tuple[int, int]], parts: int) -> list[list[int]]:
    """Splits tensors, laid end to end, into ``parts`` runs of whole rows with as equal bytes as rows allow.

    Args:
        sizes: the rows of each tensor, and its bytes.
        parts: how many.

    Returns:
        For each tensor ``parts + 1`` ascending rows: part ``i`` has those from the i-th to the one after.
    """
    total, begin, bounds = sum(size for _, size in sizes), 0, []
    for rows, size in sizes:
        inner = [
            round((total * i - begin * parts) * rows / (size * parts)) if size else 0 for i in range(1, parts)
        ]
        bounds.append([0, *(min(rows, max(0, row)) for row in inner), rows])
        begin += size
    return bounds


def _boxes(whole: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """A range of a flattened tensor as boxes: the end of a row, whole rows, the beginning of another."""
    if start >= stop:
        return
    if not whole:
        yield Box((), ())
        return
    inner = whole[1:]
    row = math.prod(inner)
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _within(last, inner, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _within(first - 1, inner, start - (first - 1) * row, row)
    if first < last:
        yield Box((first, *(0 for _ in inner)), (last - first, *inner))
    if last * row < stop:
        yield from _within(last, inner, 0, stop - last * row)


def _within(row: int, inner: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    for box in _boxes(inner, start, stop):
        yield Box((row, *box.offset), (1, *box.shape))
