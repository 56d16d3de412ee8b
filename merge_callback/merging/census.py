"""Counts the magnitudes of vectors' elements by brackets, block by block: the pass under every threshold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merge_callback.reduce import compiled
from merge_callback.reduce.compiled import Split
from merge_callback.reduce.dispatch import compiled_serves
from merge_callback.reduce.ranges import in_ranges
from merge_callback.sharding import Piece

Bits: TypeAlias = npt.NDArray[np.signedinteger[Any]]

_PICKED = 1 << 21  # elements between the brackets from which on only every second one is held

_BLOCK = 1 << 19  # elements per call of the C kernel; with fewer, threads would wait for Python


@dataclass(frozen=True)
class Part:
    """A vector, or a part of one, e.g. one tensor of a model.

    Args:
        size: number of elements.
        dtype: fp32 or fp64.
        device: the blocks' device.
        blocks: yields the elements from one index up to another in blocks; each overwrites the last.
        piece: which elements of a tensor these are, if other processes have the others.
        difference: two flat tensors whose fp32 difference the vector is, if it is one.
        runs: does what ``sample`` does, at once.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    blocks: Callable[[int, int], Iterable[Tensor]]
    piece: Piece | None = None
    difference: tuple[Tensor, Tensor] | None = None
    runs: Callable[[range, int], Iterator[Tensor]] | None = None

    def sample(self, starts: range, length: int) -> Iterator[Tensor]:
        """``length`` elements from each start on, one after the other; of the last one what there is."""
        if self.runs is not None:
            return self.runs(starts, length)
        pieces = (self.blocks(start, min(start + length, self.size)) for start in starts)
        return (block.clone() for block in chain.from_iterable(pieces))


class Bracket(NamedTuple):
    """Two magnitudes, as bits, by which the elements of a vector's parts are to be counted."""

    parts: Sequence[Part]
    low: int
    high: int


class Count(NamedTuple):
    """Counts of one block's elements: larger than ``high``, equal to it, between, and equal to ``low``.

    If both ends are the same, none count as between or as equal to ``low``. ``picked`` is every ``stride``-th
    element between. Of ``marks`` each row has the numbers at ``high``, at ``low`` and between of one part of the
    block: `MARKED` elements, or all.
    """

    length: int
    above: int
    at_high: int
    between: int
    at_low: int
    stride: int
    picked: Bits
    marks: npt.NDArray[np.int32]


Counts: TypeAlias = list[list[Count]]
"""Of every block of every part of a vector."""


def counted(brackets: Mapping[int, Bracket]) -> dict[int, Any]:
    """Counts by every bracket; those of vectors with the same θ_init in one pass."""
    groups: dict[Any, list[int]] = {}
    for i, (parts, *_) in brackets.items():
        alike = tuple(part.difference and id(part.difference[1]) for part in parts)
        groups.setdefault(alike if all(alike) else i, []).append(i)
    return {
        i: counts
        for group in groups.values()
        for i, counts in zip(group, count_pass([brackets[i] for i in group]), strict=True)
    }


def count_pass(brackets: Sequence[Bracket]) -> list[Counts]:
    """Counts every block of every part of vectors with the same θ_init, or of one vector."""
    seen = [0] * len(brackets)

    def count(parts: Sequence[Part], start: int, stop: int) -> Counts:
        counts: Counts = [[] for _ in parts]
        bounds = [(low, high) for _, low, high in brackets]
        for which, length, (above, at_high, at_low, between, marks) in _splits(parts, bounds, start, stop):
            stride = 1 << (seen[which] // _PICKED).bit_length()
            seen[which] += len(between)  # threads may overwrite each other's value; it need not be exact
            picked = between[::stride].copy()  # a view would keep all of them alive
            counts[which].append(Count(length, above, at_high, len(between), at_low, stride, picked, marks))
        return counts

    found: list[Counts] = [[] for _ in brackets]
    for parts in zip(*(parts for parts, *_ in brackets), strict=True):
        ranges = in_ranges(parts[0].size, parts[0].device, partial(count, parts))
        for which, counts in enumerate(found):
            counts.append([block for each in ranges for block in each[which]])
    return found


def count_equal(part: Part, start: int, stop: int, bits: int) -> int:
    """How many of the elements from ``start`` to ``stop`` have this magnitude."""
    return sum(at_high for _, _, (_, at_high, *_) in _splits([part], [(bits, bits)], start, stop))


def _splits(
    parts: Sequence[Part], bounds: Sequence[tuple[int, int]], start: int, stop: int
) -> Iterator[tuple[int, int, Split]]:
    """Each block of each part: which part, the block's length, and the result of ``_split`` for it."""
    pairs = [part.difference for part in parts if part.difference is not None]
    others, (initial, *_) = [theta for theta, _ in pairs], [*(initial for _, initial in pairs), None]
    if len(pairs) < len(parts) or initial is None or not compiled_serves(initial, *others):
        for which, part in enumerate(parts):
            for block in part.blocks(start, stop):
                yield which, block.numel(), split(bits_of(block), *bounds[which])
        return
    room = compiled.tally_room(len(parts), min(_BLOCK, stop - start))
    for begin in range(start, stop, _BLOCK):
        end = min(begin + _BLOCK, stop)
        splits = compiled.tally(initial[begin:end], [theta[begin:end] for theta in others], bounds, room)
        for which, found in enumerate(splits):
            yield which, end - begin, found


def split(bits: Tensor, low: int, high: int) -> Split:
    """The numbers of bits above ``high``, equal to it, and equal to ``low`` (if lower), and the bits between.

    In a vector with few different magnitudes the brackets are frequent ones. Counting those is far cheaper
    than picking them.
    """
    if bits.device.type != "cpu":
        between = bits[(bits > low) & (bits < high)].cpu().numpy()
        at_low = int((bits == low).sum()) if low < high else 0
        return _split(int((bits > high).sum()), int((bits == high).sum()), at_low, between)
    array, count = bits.numpy(), np.count_nonzero  # five times as fast as PyTorch's
    above, from_high = int(count(array > high)), array >= high
    at_high = int(count(from_high)) - above
    if low == high:
        return _split(above, at_high, 0, array[:0])
    inside = (array > low) ^ from_high
    between = array[inside.nonzero()[0]]  # faster than a mask
    at_low = int(count(array >= low)) - len(between) - at_high - above
    return _split(above, at_high, at_low, between)


def _split(above: int, at_high: int, at_low: int, between: Bits) -> Split:
    marks = np.array([[at_high, at_low, len(between)]], dtype=np.int32)
    return Split(above, at_high, at_low, between, marks)


def bits_of(block: Tensor) -> Tensor:
    """The magnitudes' bits, as integers in the same order; overwrites the block."""
    return block.abs_().view(integer_type(block.dtype))


def integer_type(dtype: torch.dtype) -> torch.dtype:
    """The integers that hold the bits of a float's dtype."""
    return torch.int64 if dtype == torch.float64 else torch.int32
