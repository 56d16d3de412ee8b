"""Finds the k-th largest magnitude of a vector exactly, without sorting it or holding it as a whole.

The bits of a non-negative float, read as an integer, are in the order of the floats. A sample brackets the
k-th magnitude. One pass counts the elements above and on the two brackets, and collects those between them:
about a sixtieth of a large vector, usually few enough (2^21) to be held. If there are more, a subsample
brackets the next pass. Brackets that missed cost one more pass, too. Elements above are always counted, never
estimated, so the result depends neither on blocks nor on threads. Each block is counted separately, which
shows in which block the elements equal to the threshold are.

Searches that run together share their passes: what the vectors have in common (θ_init) is read once for all.

Several processes that each have a part of the vector search together: they exchange their samples and counts,
and the elements between the brackets only once these are few (2^17).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from merge_callback.merging.census import (
    Bits,
    Bracket,
    Count,
    Part,
    bits_of,
    count_equal,
    counted,
    integer_type,
)
from merge_callback.reduce.compiled import MARKED
from merge_callback.reduce.ranges import most_threads, side_by_side
from merge_callback.sharding import Piece

T = TypeVar("T")

Search: TypeAlias = Generator[Any, Any, T]
"""Yields values to send to the other processes, and receives the values of all; or a `Bracket`, and receives
the counts of its elements in this process."""

Numbers: TypeAlias = npt.NDArray[np.integer[Any]]

Ties: TypeAlias = Sequence[tuple[int, int, Callable[[], Numbers]]]
"""For each block its length, how many of its elements are equal to the threshold, and what tells it of its parts."""

_SAMPLE = 1 << 16  # elements of a sample; a small vector gives a 128th, a tiny one 4096, a huge one a 512th

_EXCHANGED = 1 << 17  # elements that processes exchange at most, per search

_ORDERED = 1 << 18  # elements to be ordered from which on threads are started: two milliseconds' work

_MANY = 1 << 15  # elements to be ordered of which a sample is ordered first

_HIGH, _LOW, _BETWEEN = range(3)  # columns of a block's marks

_FEW = 1 << 12  # elements that are searched for an equal one; of more, halves are counted first

_PLACES = 1 << 12  # ranges of a vector in which processes count equal elements at once

_RUN = 512  # consecutive elements per sample: a run costs as much as one element


@dataclass(frozen=True)
class Threshold:
    """The k-th largest magnitude, and how many of the elements equal to it are among the k largest.

    Args:
        magnitude: the magnitude, never negative.
        kept: number of equal elements among the k largest; those with the lowest indices.
        equal: number of elements of this magnitude.
        ties: for each part, the blocks of this process with their numbers of equal elements.
        bits: those of the magnitude.
    """

    magnitude: float
    kept: int
    equal: int
    ties: Sequence[Ties] = field(default=(), compare=False, repr=False)
    bits: int = field(default=0, compare=False, repr=False)


def alone(search: Search[T]) -> T:
    """Runs a search in a single process."""
    return together([search])[0]


def together(
    searches: Sequence[Search[T]], exchange: Callable[[Any], list[Any]] = lambda value: [value]
) -> list[T]:
    """Runs several searches at once: they share messages, and passes over what they have in common.

    Args:
        searches: the same ones in every process.
        exchange: sends a value and returns every process's value, by process. By default there is one.
    """

    def advanced(one: tuple[int, Any]) -> tuple[int, bool, Any]:
        """Whether a search is done, and what it found or asks for next."""
        which, values = one
        try:
            return which, False, searches[which].send(values)
        except StopIteration as stop:
            return which, True, stop.value

    found: dict[int, T] = {}
    received: dict[int, Any] = dict.fromkeys(range(len(searches)))  # None starts a generator
    while received:
        asked = side_by_side(received.items(), advanced, _threads(received))
        brackets = {i: value for i, done, value in asked if isinstance(value, Bracket)}
        sent = {i: value for i, done, value in asked if not done and i not in brackets}
        found |= {i: value for i, done, value in asked if done}
        received = counted(brackets)
        everyones = exchange(sent) if sent else []
        received |= {i: [theirs[i] for theirs in everyones] for i in sent}
    return [found[i] for i in range(len(searches))]


def _threads(received: Mapping[int, Any]) -> int:
    """How many searches are worth advancing at once: several, if they have many elements to order."""
    arrays = [a for values in received.values() for a in values or () if isinstance(a, np.ndarray)]
    return most_threads() if sum(map(len, arrays)) >= _ORDERED else 1


def search_kth_largest(parts: Sequence[Part], k: int) -> Search[Threshold]:
    """The k-th largest magnitude of all parts together; other processes may have further elements of each.

    Args:
        parts: parts of one dtype.
        k: from 1 to the number of all elements. If there is no element, the threshold is 0.
    """
    sizes = yield sum(part.size for part in parts)
    total = sum(sizes)
    if not total:
        return Threshold(0.0, 0, 0)
    dtype = parts[0].dtype
    least, most = 0, int(torch.iinfo(integer_type(dtype)).max)  # bits that certainly bracket it
    sample, smaller, among = _together((yield _sample(parts, total))), total - k, total
    while True:
        low, high = _guess(sample, smaller, among, least, most)
        counts = yield Bracket(parts, low, high)
        totals = yield (*_totals(counts), _stride(counts))
        above, at_high, between, at_low, _ = map(sum, zip(*totals, strict=True))
        rank = k - above - at_high  # among those below high, from the largest
        if -at_high < rank <= 0:
            return (yield from _threshold(high, rank + at_high, counts, dtype, _HIGH))
        if between < rank <= between + at_low:
            return (yield from _threshold(low, rank - between, counts, dtype, _LOW))
        if 0 < rank <= between:
            few = between if len(totals) == 1 else _EXCHANGED
            stride = max(1 << (-(-between // few) - 1).bit_length(), *(stride for *_, stride in totals))
            sample = _together((yield _picked(counts, stride, dtype)))
            if len(sample) == between:
                value, rank = _ranked(sample, rank)
                return (yield from _threshold(value, rank, counts, dtype, _BETWEEN))
            least, most, smaller, among = low + 1, high - 1, between - rank, between
        else:  # the brackets missed
            least, most = (high + 1, most) if rank <= 0 else (least, low - 1)
            sample = sample[:0]


def search_tie_ends(parts: Sequence[Part], threshold: Threshold) -> Search[list[int]]:
    """For each part the index up to which elements equal to the threshold are kept.

    This reads one of the counted blocks, and only if some of the equal elements are not kept. Other processes
    may have further elements of each part.
    """
    if threshold.kept == threshold.equal:
        return [part.size for part in parts]
    left, ends = threshold.kept, []
    everyones = yield [sum(equal for _, equal, _ in ties) for ties in threshold.ties]
    for part, ties, *equal in zip(parts, threshold.ties, *everyones, strict=True):
        if left == 0:
            ends.append(0)
        elif sum(equal) <= left:
            ends.append(part.size)
        else:
            ends.append((yield from _search_tie_end(part, threshold, left, ties)))
        left = max(0, left - sum(equal))
    return ends


def _search_tie_end(part: Part, threshold: Threshold, keep: int, ties: Ties) -> Search[int]:
    """The index of this process's elements up to which the first ``keep`` equal ones of the part lie."""
    if part.piece is None:
        return _tie_end(part, threshold.bits, keep, ties)
    (first, last), own = part.piece.bounds, sum(equal for _, equal, _ in ties)
    everyones = yield first, last, own
    runs = sorted((start, stop) for start, stop, _ in everyones if stop > start)
    if all(stop <= start for (_, stop), (start, _) in pairwise(runs)):  # one after the other
        before = sum(equal for start, _, equal in everyones if start < first)
        return _tie_end(part, threshold.bits, min(max(0, keep - before), own), ties)
    low, high = 0, max(stop for _, stop in runs)
    while True:
        width = -(-(high - low) // _PLACES)
        up_to = np.cumsum(sum((yield _places(part, part.piece, threshold.magnitude, low, high, width))))
        place = int(np.searchsorted(up_to, keep))
        keep -= int(up_to[place - 1]) if place else 0
        low, high = low + place * width, min(low + (place + 1) * width, high)
        if width == 1:
            return part.piece.count_below(high)


def _places(part: Part, piece: Piece, magnitude: float, low: int, high: int, width: int) -> Bits:
    """The number of equal elements per ``width`` elements of the whole, from ``low`` to ``high``."""
    counts = np.zeros(_PLACES, dtype=np.int64)
    begin, end = piece.count_below(low), piece.count_below(high)
    for block in part.blocks(begin, end):
        first, _, places = piece.span(begin, begin + block.numel())
        equal = (block.abs_() == magnitude).cpu().nonzero()[:, 0]
        indices = (equal if places is None else places[equal]) + (first - low)
        counts += np.bincount(indices.numpy() // width, minlength=_PLACES)
        begin += block.numel()
    return counts


def _sample(parts: Iterable[Part], total: int) -> Bits:
    """The bits of short runs of elements, evenly spaced over all parts."""
    wanted = min(max(_SAMPLE, total >> 9), max(4096, total >> 7))
    stride = _RUN * max(1, total // wanted)
    runs, next_run = [], 0  # as an index into the part
    for part in parts:
        if starts := range(next_run, part.size, stride):
            runs += [bits_of(piece).cpu().numpy() for piece in part.sample(starts, _RUN)]
        next_run = (next_run - part.size) % stride
    return _joined(runs, part.dtype)


def _guess(sample: Bits, smaller: int, among: int, least: int, most: int) -> tuple[int, int]:
    """Brackets for the bits of the element that ``smaller`` of ``among`` elements are smaller than.

    Changes the order of the sample.
    """
    count = len(sample)
    place = smaller * count // among  # counted from the smallest element
    margin = 0 if count == among else 2 * math.isqrt(count) + 1  # four standard errors, or more
    if not count:
        return least, most
    ends = max(0, place - margin), min(count - 1, place + margin)
    sample.partition(ends)
    low, high = sample[list(ends)].tolist()
    return low if place >= margin else least, high if place + margin < count else most


def _ranked(values: Bits, rank: int) -> tuple[int, int]:
    """The ``rank``-th largest value, and its rank among those equal to it.

    Changes the order of the values.
    """
    count = len(values)
    if count >= _MANY:  # ordering takes 6 ns per value, and leaving out what is far away 2
        sample, most = values[:: count >> 12].copy(), int(np.iinfo(values.dtype).max)
        low, high = _guess(sample, count - rank, count, 0, most)
        near = values[((values >= low) & (values <= high)).nonzero()[0]]
        above = int(np.count_nonzero(values > high))
        if above < rank <= above + len(near):
            values, rank = near, rank - above
    values.partition(-rank)
    value = int(values[-rank])
    return value, rank - int(np.count_nonzero(values > value))


def _totals(counts: Sequence[Sequence[Count]]) -> tuple[int, int, int, int]:
    blocks = list(chain.from_iterable(counts))
    above, at_high = sum(block.above for block in blocks), sum(block.at_high for block in blocks)
    return above, at_high, sum(block.between for block in blocks), sum(block.at_low for block in blocks)


def _stride(counts: Sequence[Sequence[Count]]) -> int:
    """The stride with which elements between are picked in all blocks; a power of 2."""
    return max((block.stride for block in chain.from_iterable(counts)), default=1)


def _picked(counts: Sequence[Sequence[Count]], stride: int, dtype: torch.dtype) -> Bits:
    """Every ``stride``-th element between."""
    blocks = chain.from_iterable(counts)
    return _joined([block.picked[:: stride // block.stride] for block in blocks], dtype)


def _joined(pieces: Sequence[Bits], dtype: torch.dtype) -> Bits:
    empty = np.empty(0, dtype=np.int64 if dtype == torch.float64 else np.int32)
    return np.concatenate([empty, *pieces])


def _together(everyones: Sequence[Bits]) -> Bits:
    """The elements of all processes, to be ordered in place."""
    return everyones[0] if len(everyones) == 1 else np.concatenate(everyones)


def _equal(block: Count, bits: int, column: int) -> int:
    """How many of a block's elements are equal to the threshold, which is an end of the bracket, or between."""
    if column == _BETWEEN:
        return int(np.count_nonzero(block.picked == bits))
    return block.at_high if column == _HIGH else block.at_low


def _equal_by_part(block: Count, bits: int, column: int) -> Numbers:
    """The same for each part of the block that has a mark."""
    if column != _BETWEEN:
        return block.marks[:, column]
    up_to = np.concatenate([[0], np.cumsum(block.picked == bits)])
    return np.diff(up_to[np.cumsum(block.marks[:, _BETWEEN])], prepend=0)


def _threshold(
    bits: int,
    kept: int,
    counts: Sequence[Sequence[Count]],
    dtype: torch.dtype,
    column: int,
) -> Search[Threshold]:
    ties = [
        [
            (block.length, _equal(block, bits, column), partial(_equal_by_part, block, bits, column))
            for block in part
        ]
        for part in counts
    ]
    exact = np.int64(bits).view(np.float64) if dtype == torch.float64 else np.int32(bits).view(np.float32)
    everyones = yield sum(number for part in ties for _, number, _ in part)
    return Threshold(float(exact), kept, sum(everyones), ties, bits)


def _tie_end(part: Part, bits: int, keep: int, ties: Ties) -> int:
    """The index up to which at most ``keep`` elements equal to the threshold lie."""
    begin = 0
    for length, equal, by_part in ties:
        if equal <= keep:
            begin, keep = begin + length, keep - equal
            continue
        if len(up_to := np.cumsum(by_part())) > 1:
            full = int(np.searchsorted(up_to, keep, side="right"))
            keep -= int(up_to[full - 1]) if full else 0
            begin, length = begin + full * MARKED, min(MARKED, length - full * MARKED)
        while length > _FEW:  # the half in which the first one lies that is not kept
            half = length // 2
            if (equal := count_equal(part, begin, begin + half, bits)) <= keep:
                begin, keep, length = begin + half, keep - equal, length - half
            else:
                length = half
        places = torch.cat([bits_of(block) == bits for block in part.blocks(begin, begin + length)])
        return begin + int(places.nonzero()[keep])
    return part.size
