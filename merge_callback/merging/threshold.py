"""The k-th largest magnitude of a vector that is never held whole, found exactly and without sorting.

The bits of a non-negative float, read as an integer, are in the order of the floats. A sample says between
which two the wanted one should lie. One pass counts the elements above these two and equal to them, and picks
out those between: of a large vector a sixtieth, as a rule few enough (2^20) to be held. Of more, every 2^i-th
is held, as the sample for a further pass; a sample that misled costs one as well. What is above is always
counted, never guessed, so neither the blocks nor the threads matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merge_callback.merging.task_vectors import in_ranges

Bits: TypeAlias = npt.NDArray[np.signedinteger[Any]]

Ties: TypeAlias = Sequence[tuple[int, int]]
"""The length of each block, and how many of its elements are equal to the threshold."""

_SAMPLE = 1 << 16  # elements at most; of a small vector a 64th of them, of a tiny one 4096 or all

_PICKED = 1 << 20  # elements between two bits that are held at most

_WINDOW = 1 << 22  # elements that are read at a time until the last tie is found

_RUN = 512  # elements sampled in a row: a row costs as much as one element


@dataclass(frozen=True)
class Part:
    """A vector, or a part of one, e.g. one tensor of a model.

    Args:
        size: elements.
        dtype: fp32 or fp64.
        device: of the blocks.
        blocks: yields the elements from one index up to another in blocks, which are overwritten.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    blocks: Callable[[int, int], Iterable[Tensor]]


@dataclass(frozen=True)
class Threshold:
    """The k-th largest magnitude, and how many of the elements equal to it are among the k largest.

    Args:
        magnitude: never negative.
        kept: of the equal ones; those of the lowest indices.
        equal: elements of this magnitude.
        ties: where they are in each part, if the search came to know.
    """

    magnitude: float
    kept: int
    equal: int
    ties: Sequence[Ties] | None = field(default=None, compare=False, repr=False)


def kth_largest(parts: Iterable[Part], k: int) -> Threshold:
    """The k-th largest magnitude of all parts together.

    Args:
        parts: of one dtype; iterated once a pass.
        k: from 1 to the number of all elements. Without any element, the threshold is 0.
    """
    total = sum(part.size for part in parts)
    if not total:
        return Threshold(0.0, 0, 0)
    dtype = next(iter(parts)).dtype
    least, most = 0, int(torch.iinfo(_integer(dtype)).max)  # bits between which it lies for certain
    sample, smaller, among = _sample(parts, total), total - k, total
    while True:
        low, high = _guess(sample, smaller, among, least, most)
        census = _census(parts, low, high)
        rank = k - census.above  # among those up to high, from the largest
        if 0 < rank <= census.at_high:
            return Threshold(_magnitude(high, dtype), rank, census.at_high, census.ties_at_high)
        rank -= census.at_high
        if census.between < rank <= census.between + census.at_low:
            rank -= census.between
            return Threshold(_magnitude(low, dtype), rank, census.at_low, census.ties_at_low)
        if 0 < rank <= census.between and len(census.picked) == census.between:
            value = int(np.partition(census.picked, -rank)[-rank])
            larger, equal = (
                int(np.count_nonzero(found)) for found in (census.picked > value, census.picked == value)
            )
            return Threshold(_magnitude(value, dtype), rank - larger, equal)
        if 0 < rank <= census.between:
            least, most = low + 1, high - 1
            sample, smaller, among = census.picked, census.between - rank, census.between
        else:  # the sample misled
            least, most = (high + 1, most) if rank <= 0 else (least, low - 1)
            sample = sample[:0]


def tie_ends(parts: Iterable[Part], threshold: Threshold) -> Iterator[int]:
    """For each part the index up to which elements equal to the threshold are kept.

    The parts are read only where some of the equal elements are not kept.
    """
    left = threshold.kept
    for part, ties in zip(parts, threshold.ties or repeat(None)):  # noqa: B905
        if threshold.kept == threshold.equal:
            yield part.size
        else:
            end, used = _tie_end(part, threshold.magnitude, left, ties) if left else (0, 0)
            left -= used
            yield end


def _sample(parts: Iterable[Part], total: int) -> Bits:
    """The bits of short runs of elements, evenly spaced over all parts."""
    stride = _RUN * max(1, total // min(_SAMPLE, max(4096, total >> 6)))
    runs, next_run = [], 0  # as an index into the part
    for part in parts:
        for start in range(next_run, part.size, stride):
            for block in part.blocks(start, min(start + _RUN, part.size)):
                runs.append(_bits(block.clone()).cpu().numpy())
        next_run = (next_run - part.size) % stride
    return np.concatenate(runs)


def _guess(sample: Bits, smaller: int, among: int, least: int, most: int) -> tuple[int, int]:
    """Bits between which those of an element should lie than which ``smaller`` of ``among`` are smaller."""
    count = len(sample)
    place = smaller * count // among  # counted from the smallest
    margin = 0 if count == among else 2 * math.isqrt(count) + 1  # two standard errors
    if not count:
        return least, most
    ends = max(0, place - margin), min(count - 1, place + margin)
    low, high = np.partition(sample, ends)[list(ends)].tolist()
    return low if place >= margin else least, high if place + margin < count else most


@dataclass(frozen=True)
class _Census:
    """How many elements are larger than ``high``, equal to it, between, and equal to ``low``.

    Args:
        rows: for each part and block its length, and those larger, equal to ``high`` and equal to ``low``.
        between: how many are; where both ends are the same, none is, nor equal to ``low``.
        picked: the bits of those between, or of every 2^i-th of them.
    """

    rows: Sequence[Sequence[tuple[int, int, int, int]]]
    between: int
    picked: Bits

    @property
    def above(self) -> int:
        return self._sum(1)

    @property
    def at_high(self) -> int:
        return self._sum(2)

    @property
    def at_low(self) -> int:
        return self._sum(3)

    @property
    def ties_at_high(self) -> Sequence[Ties]:
        return [[(row[0], row[2]) for row in rows] for rows in self.rows]

    @property
    def ties_at_low(self) -> Sequence[Ties]:
        return [[(row[0], row[3]) for row in rows] for rows in self.rows]

    def _sum(self, column: int) -> int:
        return sum(row[column] for rows in self.rows for row in rows)


def _census(parts: Iterable[Part], low: int, high: int) -> _Census:
    picked = _Picked()

    def count(part: Part, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        rows = []
        for block in part.blocks(start, stop):
            above, at_high, at_low, between = _split(_bits(block), low, high)
            rows.append((block.numel(), above, at_high, at_low))
            if len(between):
                picked.add(between)
        return rows

    ranges = (in_ranges(part.size, part.device, partial(count, part)) for part in parts)
    rows = [list(chain.from_iterable(found)) for found in ranges]
    return _Census(rows, picked.seen, picked.all())


class _Picked:
    """Elements that several threads picked out; where they are too many, every 2^i-th of them."""

    def __init__(self) -> None:
        self.seen, self._held, self._stride = 0, 0, 1
        self._pieces: list[Bits] = []
        self._lock = Lock()

    def add(self, piece: Bits) -> None:
        with self._lock:
            self.seen += len(piece)
            self._pieces.append(piece[:: self._stride])
            self._held += len(self._pieces[-1])
            while self._held > _PICKED:
                self._stride *= 2
                self._pieces = [self.all()[::2].copy()]
                self._held = len(self._pieces[0])

    def all(self) -> Bits:
        return np.concatenate(self._pieces or [np.empty(0, dtype=np.int32)])


def _split(bits: Tensor, low: int, high: int) -> tuple[int, int, int, Bits]:
    """How many bits are above ``high``, equal to it, and equal to ``low`` (if that is lower); those between.

    A sample of a vector with few different magnitudes ends on frequent ones. Counting them is far cheaper
    than picking them.
    """
    if bits.device.type != "cpu":
        between = bits[(bits > low) & (bits < high)].cpu().numpy()
        at_low = int((bits == low).sum()) if low < high else 0
        return int((bits > high).sum()), int((bits == high).sum()), at_low, between
    array, count = bits.numpy(), np.count_nonzero  # five times as fast as PyTorch's
    above, from_high = array > high, array >= high
    larger, at_high = int(count(above)), int(count(from_high))
    if low == high:
        return larger, at_high - larger, 0, array[:0]
    inside, from_low = array > low, array >= low
    at_low = int(count(from_low)) - int(count(inside))
    inside ^= from_high
    return larger, at_high - larger, at_low, array[np.flatnonzero(inside)]


def _tie_end(part: Part, magnitude: float, keep: int, ties: Ties | None) -> tuple[int, int]:
    """Up to which index at most ``keep`` elements equal to the magnitude lie, and how many do."""
    begin, used = 0, 0
    for length, equal in _ties(part, magnitude) if ties is None else ties:
        if used + equal > keep:
            (block,) = part.blocks(begin, begin + length)
            return begin + int(_equal(block, magnitude).nonzero()[keep - used]), keep
        begin, used = begin + length, used + equal
    return part.size, used


def _ties(part: Part, magnitude: float) -> Iterator[tuple[int, int]]:
    """The length of each block, and how many of its elements are equal to the magnitude."""

    def count(first: int, start: int, stop: int) -> list[tuple[int, int]]:
        blocks = part.blocks(first + start, first + stop)
        return [(len(block), int(_equal(block, magnitude).sum())) for block in blocks]

    for first in range(0, part.size, _WINDOW):
        size = min(_WINDOW, part.size - first)
        yield from chain.from_iterable(in_ranges(size, part.device, partial(count, first)))


def _equal(block: Tensor, magnitude: float) -> Tensor:
    """1 where the block has the magnitude; in place, as a new dtype would take four times as long."""
    return block.abs_().eq_(magnitude)


def _bits(block: Tensor) -> Tensor:
    """The magnitudes' bits, as integers of the same order; in place."""
    return block.abs_().view(_integer(block.dtype))


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def _magnitude(bits: int, dtype: torch.dtype) -> float:
    return torch.tensor(bits, dtype=_integer(dtype)).view(dtype).item()
