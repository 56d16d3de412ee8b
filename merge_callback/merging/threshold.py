"""The k-th largest magnitude of a vector that is never held whole, found exactly and without sorting.

The bits of a non-negative float, read as an integer, are in the order of the floats. So magnitudes are
counted by their bits: a sample says between which two the wanted one should lie, and one pass counts all
elements above and, in up to 2^20 bins, those between. With fp32 this is most often the end of it. Bins wider
than one magnitude are narrowed by further passes; a sample that misled costs one over all magnitudes. A pass
holds one histogram (8 MiB), however large the vector and however many of its elements are equal. Its counts
are sums, so neither the blocks nor the threads matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from threading import Lock
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merge_callback.merging.task_vectors import in_ranges

Counts: TypeAlias = npt.NDArray[np.int64]

_BINS = 20  # bits: 2^20 bins hold ±2 standard errors of a sample's quantile, to the last bit of fp32

_NARROW = 15  # bits of a bin's width: the sums of squares of 2^33 elements fit into 63 bits

_SAMPLE = 1 << 16  # elements at most; of a small vector a 32nd of them, of a tiny one 4096 or all

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
    """

    magnitude: float
    kept: int
    equal: int


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
    low, high = _guess(parts, k, total)
    while True:
        shift = max(0, (high - low).bit_length() - _bins(total))
        above, bins, values = _census(parts, low, high, shift)
        up_to = np.cumsum(bins)
        within = int(up_to[-1])
        if not above < k <= above + within:
            low, high = 0, torch.iinfo(_integer(dtype)).max  # the sample misled
            continue
        found = int(np.searchsorted(up_to, above + within - k, side="right"))
        if (only := _only_value(bins, values, found, shift)) is not None:
            higher = above + within - int(up_to[found])
            return Threshold(_magnitude(low + (found << shift) + only, dtype), k - higher, int(bins[found]))
        low, high = low + (found << shift), min(high, low + (found + 1 << shift) - 1)


def tie_ends(parts: Iterable[Part], threshold: Threshold) -> Iterator[int]:
    """For each part the index up to which elements equal to the threshold are kept.

    The parts are read only where some of the equal elements are not kept.
    """
    left = threshold.kept
    for part in parts:
        if threshold.kept == threshold.equal:
            yield part.size
        else:
            end, used = _tie_end(part, threshold.magnitude, left) if left else (0, 0)
            left -= used
            yield end


def _bins(total: int) -> int:
    """Bits of a bin's number. Bins cost as much as elements do: an eighth of them, or fewer, is little."""
    return min(_BINS, max(2, total.bit_length() - 3))


def _guess(parts: Iterable[Part], k: int, total: int) -> tuple[int, int]:
    """Bits between which those of the k-th largest magnitude should lie, judged by a sample."""
    sample = np.concatenate([_bits(run).cpu().numpy() for run in _sampled(parts, total)])
    count = len(sample)
    place = (total - k) * count // total  # counted from the smallest
    margin = 0 if count == total else 2 * math.isqrt(count) + 1
    ends = max(0, place - margin), min(count - 1, place + margin)
    low, high = np.partition(sample, ends)[list(ends)].tolist()
    return low if place >= margin else 0, high if place + margin < count else np.iinfo(sample.dtype).max


def _sampled(parts: Iterable[Part], total: int) -> Iterator[Tensor]:
    """Short runs of elements, evenly spaced over all parts; a copy of each."""
    stride = _RUN * max(1, total // min(_SAMPLE, max(4096, total >> 5)))
    next_run = 0  # as an index into the part
    for part in parts:
        for start in range(next_run, part.size, stride):
            for block in part.blocks(start, min(start + _RUN, part.size)):
                yield block.clone()
        next_run = (next_run - part.size) % stride


def _only_value(bins: Counts, values: Counts, found: int, shift: int) -> int | None:
    """Where in its bin the one value lies that all elements of the bin have; ``None`` if they differ.

    They are equal just if ``n Σr² = (Σr)²``. Coarse numbers, as the differences of bf16 ones, often are.
    """
    if not 0 < shift <= _NARROW:
        return None if shift else 0
    count, total, squares = int(bins[found]), int(values[0, found]), int(values[1, found])
    return total // count if count * squares == total * total else None


def _census(parts: Iterable[Part], low: int, high: int, shift: int) -> tuple[int, Counts, Counts]:
    """How many elements have bits above ``high``; and of those from ``low`` on, how many are in each bin.

    And the sums of their places within the bin, and of the squares of these, where they are wanted.
    """
    size, lock = ((high - low) >> shift) + 1, Lock()
    bins = torch.zeros(size, dtype=torch.int64)
    narrow, mask = 0 < shift <= _NARROW, (1 << shift) - 1
    values = torch.zeros(2, size if narrow else 1, dtype=torch.int64)

    def count(part: Part, start: int, stop: int) -> int:
        above = at_high = at_low = 0
        for block in part.blocks(start, stop):
            *numbers, between = _split(_bits(block), low, high)
            above, at_high, at_low = above + numbers[0], at_high + numbers[1], at_low + numbers[2]
            offsets = (between - low).cpu()
            which = offsets >> shift
            with lock:
                bins.index_add_(0, which, torch.ones(len(which), dtype=torch.int64))
                if narrow:
                    places = (offsets & mask).long()
                    values[0].index_add_(0, which, places)
                    values[1].index_add_(0, which, places.square_())
        with lock:
            bins[-1] += at_high
            bins[0] += at_low if low < high else 0
            values[0, -1] += at_high * ((high - low) & mask if narrow else 0)
            values[1, -1] += at_high * ((high - low) & mask if narrow else 0) ** 2
        return above

    above = sum(sum(in_ranges(part.size, part.device, partial(count, part))) for part in parts)
    return above, bins.numpy(), values.numpy()


def _split(bits: Tensor, low: int, high: int) -> tuple[int, int, int, Tensor]:
    """How many bits are above ``high``, equal to it, and equal to ``low``; and those between.

    A sample of a vector with few different magnitudes ends on frequent ones. Counting them is far cheaper
    than picking them.
    """
    if bits.device.type != "cpu":
        between = bits[(bits > low) & (bits < high)]
        return int((bits > high).sum()), int((bits == high).sum()), int((bits == low).sum()), between
    array, count = bits.numpy(), np.count_nonzero  # five times as fast as PyTorch's
    between = torch.from_numpy(array[(array > low) & (array < high)])
    return int(count(array > high)), int(count(array == high)), int(count(array == low)), between


def _tie_end(part: Part, magnitude: float, keep: int) -> tuple[int, int]:
    """Up to which index at most ``keep`` elements equal to the magnitude lie, and how many do."""
    begin, used = 0, 0
    for length, equal in _ties(part, magnitude):
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
