"""Which entries of a vector are its k of largest magnitude, without sorting or holding it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_LOW = 16  # bits counted in the second pass; the 15 above them are counted in the first
_INFINITE = 0x7F800000 >> _LOW  # where the infinities and NaNs begin

Blocks = Callable[[], Iterable[Tensor]]
"""Reads the vectors once more: fp32 blocks ``(N, any size)``, always in the same order."""


def thresholds(blocks: Blocks, count: int) -> tuple[Tensor, Tensor]:
    """What to keep of each of N vectors, so that its ``count`` entries of largest magnitude remain.

    A radix selection: the bits of a non-negative fp32 number order like the number. One pass counts their
    upper half, a second one the lower half of those that fall on the boundary. Exact.

    Args:
        blocks: the vectors; read twice.
        count: 1 … size of a vector.

    Returns:
        The smallest magnitude kept, fp32 ``(N,)``, and how many entries of just that magnitude to keep,
        int64 ``(N,)``: those of lower index first.

    Raises:
        ValueError: for a vector with an infinite or NaN entry.
    """
    upper = _histograms((row >> _LOW for row in _bits(block)) for block in blocks())
    if any(bool(counts[_INFINITE:].any()) for counts in upper):
        raise ValueError("there are infinite or NaN entries")
    highs, left = _boundary(upper, [count] * len(upper))
    lower = _histograms(
        (row[row >> _LOW == high] & 0xFFFF for row, high in zip(_bits(block), highs, strict=True))
        for block in blocks()
    )
    lows, ties = _boundary(lower, left)
    bits = torch.tensor([(high << _LOW) | low for high, low in zip(highs, lows, strict=True)])
    return bits.to(torch.int32).view(torch.float32), torch.tensor(ties)


def keep_top(block: Tensor, threshold: Tensor, ties: Tensor) -> tuple[Tensor, Tensor]:
    """One block with everything but the entries to keep set to 0.

    Args:
        block: fp32 ``(N, any size)``.
        threshold: ``(N,)``, from ``thresholds``.
        ties: ``(N,)``, how many entries at the threshold are still to be kept.

    Returns:
        The pruned block, and the ties left for the next one.
    """
    magnitude = block.abs()
    kept, tied = magnitude > threshold[:, None], magnitude == threshold[:, None]
    found = tied.sum(1)
    for row in found.nonzero().flatten().tolist():
        kept[row, tied[row].nonzero().flatten()[: int(ties[row])]] = True
    return block * kept, (ties - found).clamp(min=0)


def _bits(block: Tensor) -> Tensor:
    return block.abs().view(torch.int32)


def _histograms(blocks: Iterable[Iterable[Tensor]]) -> list[Tensor]:
    """How often each 16-bit number occurs in each row of all blocks."""
    totals: list[Tensor] = []
    for rows in blocks:
        counts = [torch.bincount(row, minlength=1 << _LOW) for row in rows]
        totals = [a + b for a, b in zip(totals, counts, strict=True)] if totals else counts
    return totals


def _boundary(histograms: Sequence[Tensor], counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """The bin of the ``count``-th largest, and its rank among those of that bin (from 1)."""
    bins, ranks = [], []
    for histogram, count in zip(histograms, counts, strict=True):
        above = histogram.flip(0).cumsum(0)
        index = int(torch.searchsorted(above, count))
        bins.append(len(histogram) - 1 - index)
        ranks.append(count - (int(above[index - 1]) if index else 0))
    return bins, ranks
