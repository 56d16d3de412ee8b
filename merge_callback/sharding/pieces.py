"""Parts of tensors: which elements of the whole tensor a rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor, of shape ``shape``, that begins at index ``offset``."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.shape)

    def of(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor in the box (a view)."""
        for dim, (start, length) in enumerate(zip(self.offset, self.shape, strict=True)):
            whole = whole.narrow(dim, start, length)
        return whole


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: the elements of its boxes, one box after the other.

    DTensor shards and slices of rows are one box. Several boxes make up a range of a flattened tensor, as
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

    @classmethod
    def of_pairs(cls, complex_one: Piece) -> Piece:
        """The part of a tensor of real and imaginary parts that is a part of the complex one."""
        boxes = tuple(Box((*box.offset, 0), (*box.shape, 2)) for box in complex_one.boxes)
        start = None if complex_one.start is None else 2 * complex_one.start
        return cls((*complex_one.whole, 2), boxes, start)

    @property
    def of_complex(self) -> Piece:
        """The inverse of ``of_pairs``; a piece that splits no pair."""
        boxes = tuple(Box(box.offset[:-1], box.shape[:-1]) for box in self.boxes)
        return Piece(self.whole[:-1], boxes, None if self.start is None else self.start // 2)

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
        """The piece that consists of rows ``start`` to ``stop`` of this one."""
        if self.start is not None:
            return Piece.flat(self.whole, self.start + start, self.start + stop)
        if not self.whole or not self.boxes:
            return self if stop > start else Piece(self.whole, ())
        box = self.boxes[0]
        offset = (box.offset[0] + start, *box.offset[1:])
        return Piece.box(self.whole, offset, (stop - start, *box.shape[1:]))

    @property
    def is_all(self) -> bool:
        """Whether this is the whole tensor."""
        return self.numel == math.prod(self.whole)

    @property
    def bounds(self) -> tuple[int, int]:
        """The first element's index in the flattened whole, and one past the last one's; 0, 0 if empty."""
        if not self.boxes:
            return 0, 0
        first, last = self.boxes[0], self.boxes[-1]
        end = [offset + length - 1 for offset, length in zip(last.offset, last.shape, strict=True)]
        return _index(self.whole, first.offset), _index(self.whole, end) + 1

    def span(self, start: int, stop: int) -> tuple[int, int, Tensor | None]:
        """The places of the piece's elements ``start`` to ``stop`` in the flattened whole, in the same order.

        Returns:
            The first element's index there, one past the last one's, and the index of each element relative
            to the first (int64); ``None`` if the elements are contiguous.
        """
        if stop <= start:
            return 0, 0, None
        found, begin = [], 0
        for box in self.boxes:
            found.append(_indices(self.whole, box, max(0, start - begin), min(box.numel, stop - begin)))
            begin += box.numel
        indices = torch.cat(found)
        first, last = int(indices[0]), int(indices[-1]) + 1
        return first, last, None if last - first == stop - start else indices.sub_(first)

    def count_below(self, index: int) -> int:
        """How many of the piece's elements lie before element ``index`` of the flattened whole."""
        return sum(_count_below(self.whole, box, index) for box in self.boxes)

    def place(self, part: Tensor, whole: Tensor) -> None:
        """Writes the piece's elements, ``part`` in any shape, to their places in the whole tensor."""
        start, flat = 0, part.reshape(-1)
        for box in self.boxes:
            box.of(whole).copy_(flat[start : start + box.numel].view(box.shape))
            start += box.numel

    def take(self, whole: Tensor) -> Tensor:
        """The piece's elements of the whole tensor, flat (a view if it is all): the inverse of ``place``."""
        if self.is_all:
            return whole.reshape(-1)
        return torch.cat([whole.new_empty(0), *(box.of(whole).reshape(-1) for box in self.boxes)])


def split_rows(sizes: Sequence[tuple[int, int]], parts: int) -> list[list[int]]:
    """Splits tensors, laid end to end, into ``parts`` runs of whole rows of nearly equal bytes.

    Args:
        sizes: the rows of each tensor, and its bytes.
        parts: number of runs.

    Returns:
        For each tensor ``parts + 1`` ascending rows: part ``i`` has the rows from the i-th bound to the next.
    """
    total, begin, bounds = sum(size for _, size in sizes), 0, []
    for rows, size in sizes:
        inner = [
            round((total * i - begin * parts) * rows / (size * parts)) if size else 0 for i in range(1, parts)
        ]
        bounds.append([0, *(min(rows, max(0, row)) for row in inner), rows])
        begin += size
    return bounds


def _index(whole: tuple[int, ...], place: Sequence[int]) -> int:
    index = 0
    for size, coordinate in zip(whole, place, strict=True):
        index = index * size + coordinate
    return index


def _indices(whole: tuple[int, ...], box: Box, start: int, stop: int) -> Tensor:
    left, indices, stride = (
        torch.arange(start, max(start, stop), device="cpu"),
        torch.zeros(max(0, stop - start), device="cpu").long(),
        1,
    )
    for size, offset, length in zip(reversed(whole), reversed(box.offset), reversed(box.shape), strict=True):
        indices += (left % length + offset) * stride
        left, stride = left // length, stride * size
    return indices


def _count_below(whole: tuple[int, ...], box: Box, index: int) -> int:
    count, inside, stride = 0, box.numel, math.prod(whole)
    if index >= stride:
        return box.numel
    for size, offset, length in zip(whole, box.offset, box.shape, strict=True):
        stride, inside = stride // size, inside // length
        coordinate, index = index // stride - offset, index % stride
        count += min(max(coordinate, 0), length) * inside
        if not 0 <= coordinate < length:
            break
    return count


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
