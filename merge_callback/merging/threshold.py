"""The k-th largest magnitude of a vector that is never held whole, found exactly and without sorting.

The bits of a non-negative float, read as an integer, are in the order of the floats. A sample says between
which two the wanted one should lie. One pass counts the elements above these two and equal to them, and picks
out those between: of a large vector a sixtieth, as a rule few enough (2^20) to be held. Of more, some are
held, as the sample for a further pass; a sample that misled costs one as well. What is above is always
counted, never guessed, so neither the blocks nor the threads matter. Each block is counted by itself, which
tells where the elements equal to the wanted one are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merge_callback.merging.task_vectors import in_ranges

Bits: TypeAlias = npt.NDArray[np.signedinteger[Any]]

Ties: TypeAlias = Sequence[tuple[int, int]]
"""The length of each block, and how many of its elements are equal to the threshold."""

_SAMPLE = 1 << 16  # elements at most; of a small vector a 128th of them, of a tiny one 4096 or all

_PICKED = 1 << 20  # elements between two bits, after which only every second one is held

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
        ties: where they are, for each part.
    """

    magnitude: float
    kept: int
    equal: int
    ties: Sequence[Ties] = field(default=(), compare=False, repr=False)


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
        counts = _census(parts, low, high)
        above, at_high, between, at_low = _totals(counts)
        rank = k - above - at_high  # among those below high, from the largest
        if -at_high < rank <= 0:
            return _threshold(high, rank + at_high, counts, dtype, lambda block: block.at_high)
        if between < rank <= between + at_low:
            return _threshold(low, rank - between, counts, dtype, lambda block: block.at_low)
        if 0 < rank <= between:
            sample = _picked(counts)
            if len(sample) == between:
                value = int(np.partition(sample, -rank)[-rank])
                rank -= int(np.count_nonzero(sample > value))
                return _threshold(value, rank, counts, dtype, partial(_picked_equal, value))
            least, most, smaller, among = low + 1, high - 1, between - rank, between
        else:  # the sample misled
            least, most = (high + 1, most) if rank <= 0 else (least, low - 1)
            sample = sample[:0]


def tie_ends(parts: Iterable[Part], threshold: Threshold) -> Iterator[int]:
    """For each part the index up to which elements equal to the threshold are kept.

    One block is read, and that only where some of the equal elements are not kept.
    """
    left = threshold.kept
    for which, part in enumerate(parts):
        if threshold.kept == threshold.equal:
            yield part.size
        else:
            end, used = _tie_end(part, threshold.magnitude, left, threshold.ties[which]) if left else (0, 0)
            left -= used
            yield end


def _sample(parts: Iterable[Part], total: int) -> Bits:
    """The bits of short runs of elements, evenly spaced over all parts."""
    stride = _RUN * max(1, total // min(_SAMPLE, max(4096, total >> 7)))
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
        for block in part.blocks(start, stop):
            above, at_high, at_low, between = _split(_bits(block), low, high)
            stride = 1 << (seen // _PICKED).bit_length()
            seen += len(between)
            picked = between[::stride].copy() if stride > 1 else between
            counts.append(_Count(block.numel(), above, at_high, len(between), at_low, stride, picked))
        return counts

    ranges = (in_ranges(part.size, part.device, partial(count, part)) for part in parts)
    return [list(chain.from_iterable(found)) for found in ranges]


def _totals(counts: Sequence[Sequence[_Count]]) -> tuple[int, int, int, int]:
    blocks = list(chain.from_iterable(counts))
    above, at_high = sum(block.above for block in blocks), sum(block.at_high for block in blocks)
    return above, at_high, sum(block.between for block in blocks), sum(block.at_low for block in blocks)


def _picked(counts: Sequence[Sequence[_Count]]) -> Bits:
    """The elements between, or where some of them were not picked a share that is the same in all blocks."""
    blocks = list(chain.from_iterable(counts))
    stride = max(block.stride for block in blocks)
    return np.concatenate([block.picked[:: stride // block.stride] for block in blocks])


def _picked_equal(bits: int, block: _Count) -> int:
    return int(np.count_nonzero(block.picked == bits))


def _threshold(
    bits: int,
    kept: int,
    counts: Sequence[Sequence[_Count]],
    dtype: torch.dtype,
    equal: Callable[[_Count], int],
) -> Threshold:
    ties = [[(block.length, equal(block)) for block in part] for part in counts]
    magnitude = torch.tensor(bits, dtype=_integer(dtype)).view(dtype).item()
    return Threshold(magnitude, kept, sum(number for part in ties for _, number in part), ties)


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
    above, from_high = int(count(array > high)), array >= high
    at_high = int(count(from_high)) - above
    if low == high:
        return above, at_high, 0, array[:0].copy()  # a view would hold the block
    inside = (array > low) ^ from_high
    between = array[inside.nonzero()[0]]  # faster than a mask
    at_low = int(count(array >= low)) - len(between) - at_high - above
    return above, at_high, at_low, between


def _tie_end(part: Part, magnitude: float, keep: int, ties: Ties) -> tuple[int, int]:
    """Up to which index at most ``keep`` elements equal to the magnitude lie, and how many do."""
    begin, used = 0, 0
    for length, equal in ties:
        if used + equal > keep:
            (block,) = part.blocks(begin, begin + length)
            return begin + int((block.abs_() == magnitude).nonzero()[keep - used]), keep
        begin, used = begin + length, used + equal
    return part.size, used


def _bits(block: Tensor) -> Tensor:
    """The magnitudes' bits, as integers of the same order; in place."""
    return block.abs_().view(_integer(block.dtype))


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32
