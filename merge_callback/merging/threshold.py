"""The k-th largest magnitude of a vector that is never held whole, found exactly and without sorting.

The bits of a non-negative float, read as an integer, are in the order of the floats. A sample says between
which two the wanted one should lie. One pass counts the elements above these two and equal to them, and picks
out those between: of a large vector a sixtieth, as a rule few enough (2^20) to be held. Of more, some are
held, as the sample for a further pass; a sample that misled costs one as well. What is above is always
counted, never guessed, so neither the blocks nor the threads matter. Each block is counted by itself, which
tells where the elements equal to the wanted one are.

Several processes that each have a part of the vector search together: they tell each other their samples and
counts, and of the elements between only as many as are few (2^17), narrowing down further before that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merge_callback.reduce import compiled
from merge_callback.reduce.dispatch import compiled_serves, triton_serves
from merge_callback.reduce.ranges import in_ranges
from merge_callback.sharding import Piece

T = TypeVar("T")

Search: TypeAlias = Generator[Any, list[Any], T]
"""Yields what other processes have to know, and gets what each of them has yielded in its place."""

Bits: TypeAlias = npt.NDArray[np.signedinteger[Any]]

Split: TypeAlias = tuple[int, int, int, Bits]

Ties: TypeAlias = Sequence[tuple[int, int]]
"""The length of each block, and how many of its elements are equal to the threshold."""

_SAMPLE = 1 << 16  # elements at most; of a small vector a 128th of them, of a tiny one 4096 or all

_PICKED = 1 << 20  # elements between two bits, after which only every second one is held

_TOLD = 1 << 17  # elements that processes tell each other at most, of each search

_PLACES = 1 << 12  # stretches of a vector in which processes count equal elements at once

_BLOCK = 1 << 18  # elements split at once in C: with fewer, threads would wait for Python

_RUN = 512  # elements sampled in a row: a row costs as much as one element


@dataclass(frozen=True)
class Part:
    """A vector, or a part of one, e.g. one tensor of a model.

    Args:
        size: elements.
        dtype: fp32 or fp64.
        device: of the blocks.
        blocks: yields the elements from one index up to another in blocks, which are overwritten.
        piece: which elements of a tensor these are, where other processes have the others.
        difference: two flat tensors whose difference it is in fp32, where it is one.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    blocks: Callable[[int, int], Iterable[Tensor]]
    piece: Piece | None = None
    difference: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Threshold:
    """The k-th largest magnitude, and how many of the elements equal to it are among the k largest.

    Args:
        magnitude: never negative.
        kept: of the equal ones; those of the lowest indices.
        equal: elements of this magnitude.
        ties: where they are in this process's part of each part.
    """

    magnitude: float
    kept: int
    equal: int
    ties: Sequence[Ties] = field(default=(), compare=False, repr=False)


def alone(search: Search[T]) -> T:
    """Makes a search without other processes."""
    return together([search], lambda told: [told])[0]


def together(searches: Sequence[Search[T]], exchange: Callable[[Any], list[Any]]) -> list[T]:
    """Makes several searches at once; what all of them have to tell goes in one message.

    Args:
        searches: the same ones in every process.
        exchange: gives what each process has told, by process.
    """
    found: dict[int, T] = {}
    told: dict[int, Any] = dict.fromkeys(range(len(searches)))  # None starts a generator
    while told:
        telling = {}
        for i, heard in told.items():
            try:
                telling[i] = searches[i].send(heard)
            except StopIteration as stop:
                found[i] = stop.value
        everybody = exchange(telling) if telling else []
        told = {i: [theirs[i] for theirs in everybody] for i in telling}
    return [found[i] for i in range(len(searches))]


def search_kth_largest(parts: Sequence[Part], k: int) -> Search[Threshold]:
    """The k-th largest magnitude of all parts together; other processes may have further elements of each.

    Args:
        parts: of one dtype.
        k: from 1 to the number of all elements. Without any element, the threshold is 0.
    """
    sizes = yield sum(part.size for part in parts)
    total = sum(sizes)
    if not total:
        return Threshold(0.0, 0, 0)
    dtype = parts[0].dtype
    least, most = 0, int(torch.iinfo(_integer(dtype)).max)  # bits between which it lies for certain
    sample, smaller, among = np.concatenate((yield _sample(parts, total))), total - k, total
    while True:
        low, high = _guess(sample, smaller, among, least, most)
        counts = _census(parts, low, high)
        told = yield (*_totals(counts), _stride(counts))
        above, at_high, between, at_low, _ = map(sum, zip(*told, strict=True))
        rank = k - above - at_high  # among those below high, from the largest
        if -at_high < rank <= 0:
            return (yield from _threshold(high, rank + at_high, counts, dtype, lambda block: block.at_high))
        if between < rank <= between + at_low:
            return (yield from _threshold(low, rank - between, counts, dtype, lambda block: block.at_low))
        if 0 < rank <= between:
            few = between if len(told) == 1 else _TOLD  # so many at most are told to others
            stride = max(1 << (-(-between // few) - 1).bit_length(), *(stride for *_, stride in told))
            sample = np.concatenate((yield _picked(counts, stride, dtype)))
            if len(sample) == between:
                value = int(np.partition(sample, -rank)[-rank])
                rank -= int(np.count_nonzero(sample > value))
                return (yield from _threshold(value, rank, counts, dtype, partial(_picked_equal, value)))
            least, most, smaller, among = low + 1, high - 1, between - rank, between
        else:  # the sample misled
            least, most = (high + 1, most) if rank <= 0 else (least, low - 1)
            sample = sample[:0]


def search_tie_ends(parts: Sequence[Part], threshold: Threshold) -> Search[list[int]]:
    """For each part the index up to which elements equal to the threshold are kept.

    One block, as they were counted, is read, and that only where some of the equal elements are not kept.
    Other processes may have further elements of each part.
    """
    if threshold.kept == threshold.equal:
        return [part.size for part in parts]
    left, ends = threshold.kept, []
    told = yield [sum(equal for _, equal in ties) for ties in threshold.ties]
    for part, ties, *equal in zip(parts, threshold.ties, *told, strict=True):
        if left == 0:
            ends.append(0)
        elif sum(equal) <= left:
            ends.append(part.size)
        else:
            ends.append((yield from _search_tie_end(part, threshold.magnitude, left, ties)))
        left = max(0, left - sum(equal))
    return ends


def _search_tie_end(part: Part, magnitude: float, keep: int, ties: Ties) -> Search[int]:
    """Up to which index of this process's part the first ``keep`` equal elements of the whole part lie."""
    if part.piece is None:
        return _tie_end(part, magnitude, keep, ties)
    (first, last), own = part.piece.bounds, sum(equal for _, equal in ties)
    told = yield first, last, own
    runs = sorted((start, stop) for start, stop, _ in told if stop > start)
    if all(stop <= start for (_, stop), (start, _) in pairwise(runs)):  # one after the other
        before = sum(equal for start, _, equal in told if start < first)
        return _tie_end(part, magnitude, min(max(0, keep - before), own), ties)
    low, high = 0, max(stop for _, stop in runs)
    while True:
        width = -(-(high - low) // _PLACES)
        up_to = np.cumsum(sum((yield _places(part, part.piece, magnitude, low, high, width))))
        place = int(np.searchsorted(up_to, keep))
        keep -= int(up_to[place - 1]) if place else 0
        low, high = low + place * width, min(low + (place + 1) * width, high)
        if width == 1:
            return part.piece.count_below(high)


def _places(part: Part, piece: Piece, magnitude: float, low: int, high: int, width: int) -> Bits:
    """How many equal elements there are in each ``width`` elements of the whole, from ``low`` to ``high``."""
    counts = np.zeros(_PLACES, dtype=np.int64)
    begin, end = piece.count_below(low), piece.count_below(high)
    for block in part.blocks(begin, end):
        first, _, where = piece.span(begin, begin + block.numel())
        equal = (block.abs_() == magnitude).cpu().nonzero()[:, 0]
        indices = (equal if where is None else where[equal]) + (first - low)
        counts += np.bincount(indices.numpy() // width, minlength=_PLACES)
        begin += block.numel()
    return counts


def _sample(parts: Iterable[Part], total: int) -> Bits:
    """The bits of short runs of elements, evenly spaced over all parts."""
    stride = _RUN * max(1, total // min(_SAMPLE, max(4096, total >> 7)))
    runs, next_run = [], 0  # as an index into the part
    for part in parts:
        for start in range(next_run, part.size, stride):
            for block in part.blocks(start, min(start + _RUN, part.size)):
                runs.append(_bits(block.clone()).cpu().numpy())
        next_run = (next_run - part.size) % stride
    return _joined(runs, part.dtype)


def _guess(sample: Bits, smaller: int, among: int, least: int, most: int) -> tuple[int, int]:
    """Bits between which those of an element should lie than which ``smaller`` of ``among`` are smaller."""
    count = len(sample)
    place = smaller * count // among  # counted from the smallest
    margin = 0 if count == among else 2 * math.isqrt(count) + 1  # four standard errors, or more
    if not count:
        return least, most
    ends = max(0, place - margin), min(count - 1, place + margin)
    low, high = np.partition(sample, ends)[list(ends)].tolist()
    return low if place >= margin else least, high if place + margin < count else most


class _Count(NamedTuple):
    """The elements of one block that are larger than ``high``, equal to it, between, and equal to ``low``.

    Where both ends are the same, none is between, nor equal to ``low``. Of those between every ``stride``-th
    is ``picked``.
    """

    length: int
    above: int
    at_high: int
    between: int
    at_low: int
    stride: int
    picked: Bits


def _census(parts: Iterable[Part], low: int, high: int) -> list[list[_Count]]:
    """Counts every block of every part."""
    seen = 0

    def count(part: Part, start: int, stop: int) -> list[_Count]:
        nonlocal seen  # threads may overwrite each other's: it need not be exact
        counts = []
        for length, (above, at_high, at_low, between) in _splits(part, start, stop, low, high):
            stride = 1 << (seen // _PICKED).bit_length()
            seen += len(between)
            picked = between[::stride].copy()  # a view would hold more
            counts.append(_Count(length, above, at_high, len(between), at_low, stride, picked))
        return counts

    ranges = (in_ranges(part.size, part.device, partial(count, part)) for part in parts)
    return [list(chain.from_iterable(found)) for found in ranges]


def _totals(counts: Sequence[Sequence[_Count]]) -> tuple[int, int, int, int]:
    blocks = list(chain.from_iterable(counts))
    above, at_high = sum(block.above for block in blocks), sum(block.at_high for block in blocks)
    return above, at_high, sum(block.between for block in blocks), sum(block.at_low for block in blocks)


def _stride(counts: Sequence[Sequence[_Count]]) -> int:
    """Every how many-th element between is picked in all blocks; a power of 2."""
    return max((block.stride for block in chain.from_iterable(counts)), default=1)


def _picked(counts: Sequence[Sequence[_Count]], stride: int, dtype: torch.dtype) -> Bits:
    """Every ``stride``-th of the elements between."""
    blocks = chain.from_iterable(counts)
    return _joined([block.picked[:: stride // block.stride] for block in blocks], dtype)


def _joined(pieces: Sequence[Bits], dtype: torch.dtype) -> Bits:
    empty = np.empty(0, dtype=np.int64 if dtype == torch.float64 else np.int32)
    return np.concatenate([empty, *pieces])


def _picked_equal(bits: int, block: _Count) -> int:
    return int(np.count_nonzero(block.picked == bits))


def _threshold(
    bits: int,
    kept: int,
    counts: Sequence[Sequence[_Count]],
    dtype: torch.dtype,
    equal: Callable[[_Count], int],
) -> Search[Threshold]:
    ties = [[(block.length, equal(block)) for block in part] for part in counts]
    magnitude = torch.tensor(bits, dtype=_integer(dtype), device="cpu").view(dtype).item()
    told = yield sum(number for part in ties for _, number in part)
    return Threshold(magnitude, kept, sum(told), ties)


def _splits(part: Part, start: int, stop: int, low: int, high: int) -> Iterator[tuple[int, Split]]:
    """The length of each block of a part, and what ``_split`` says of it."""
    if part.difference is None or not compiled_serves(*part.difference):
        for block in part.blocks(start, stop):
            yield block.numel(), _split(_bits(block), low, high)
        return
    for begin in range(start, stop, _BLOCK):
        theta, initial = (whole[begin : min(begin + _BLOCK, stop)] for whole in part.difference)
        yield theta.numel(), compiled.split(theta, initial, low, high)


def _split(bits: Tensor, low: int, high: int) -> Split:
    """How many bits are above ``high``, equal to it, and equal to ``low`` (if that is lower); those between.

    A sample of a vector with few different magnitudes ends on frequent ones. Counting them is far cheaper
    than picking them.
    """
    if triton_serves(bits, dtypes={torch.int32}):
        from merge_callback.reduce import triton_census

        above, at_high, at_low, found = triton_census.split(bits, low, high)
        return above, at_high, at_low, found.cpu().numpy()
    if bits.device.type != "cpu":
        between = bits[(bits > low) & (bits < high)].cpu().numpy()
        at_low = int((bits == low).sum()) if low < high else 0
        return int((bits > high).sum()), int((bits == high).sum()), at_low, between
    array, count = bits.numpy(), np.count_nonzero  # five times as fast as PyTorch's
    above, from_high = int(count(array > high)), array >= high
    at_high = int(count(from_high)) - above
    if low == high:
        return above, at_high, 0, array[:0]
    inside = (array > low) ^ from_high
    between = array[inside.nonzero()[0]]  # faster than a mask
    at_low = int(count(array >= low)) - len(between) - at_high - above
    return above, at_high, at_low, between


def _tie_end(part: Part, magnitude: float, keep: int, ties: Ties) -> int:
    """Up to which index at most ``keep`` elements equal to the magnitude lie."""
    begin, used = 0, 0
    for length, equal in ties:
        if used + equal <= keep:
            begin, used = begin + length, used + equal
            continue
        for block in part.blocks(begin, begin + length):
            places = (block.abs_() == magnitude).nonzero()
            if used + len(places) > keep:
                return begin + int(places[keep - used])
            begin, used = begin + block.numel(), used + len(places)
    return part.size


def _bits(block: Tensor) -> Tensor:
    """The magnitudes' bits, as integers of the same order; in place."""
    return block.abs_().view(_integer(block.dtype))


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32
