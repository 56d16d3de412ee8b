"""The pass with PyTorch's own operations, on any device, in blocks that are read from memory only once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from merge_callback.reduce.passes import Outs, Weights, rows_of

BLOCK = 1 << 19
"""Elements per block: the fp32 accumulator (2 MiB) and one block of input stay in the last-level cache.
On a 2-core EPYC, N=10, blocks of 2^19 to 2^20 were the fastest of 2^16 … 2^21. The split is fixed, so the
partial sums of a distance, and so its last bit, depend only on the layout and PyTorch's threads."""

_BLOCK_ALONE = 1 << 17
"""The same for a weighted sum alone with a single PyTorch thread: both fit into the second-level cache, which
makes it a third faster. The sum of an element is the same in any block."""


def accumulator_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which floating-point tensors are summed: fp64 if one is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def one_pass(
    sources: Sequence[Tensor],
    weights: Weights,
    out: Outs,
    contrast: Sequence[float] | None,
    bounds: Sequence[int],
) -> Tensor | None:
    """See ``reduce.one_pass``."""
    rows, wide = rows_of(weights, out), accumulator_dtype(*sources)
    block = min(BLOCK, _BLOCK_ALONE) if contrast is None and torch.get_num_threads() == 1 else BLOCK
    total, scratch, other = (_buffer(sources[0], wide, min(block, sources[0].numel())) for _ in range(3))
    squares = torch.zeros(len(bounds), dtype=torch.float64, device=sources[0].device)
    for start in range(0, sources[0].numel(), block):
        blocks = [source[start : start + block] for source in sources]
        for row in rows:
            _weighted_sum(blocks, row.weights, row.out[start : start + block], total, scratch)
        if contrast is not None:
            _add_squares(squares, _contrast(blocks, contrast, other, scratch), bounds, start)
    return None if contrast is None else squares.cpu()


def _buffer(like: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(size, dtype=dtype, device=like.device)


def _weighted_sum(
    blocks: Sequence[Tensor], weights: Sequence[float], out: Tensor, total: Tensor, scratch: Tensor
) -> None:
    # Sums directly into the output if it has the accumulator's dtype: one write less per block.
    total = out if out.dtype == total.dtype else total[: out.numel()]
    _sum_up(
        [(block, weight) for block, weight in zip(blocks, weights, strict=True) if weight], total, scratch
    )
    if total is not out:
        out.copy_(total)


def _sum_up(terms: Sequence[tuple[Tensor, float]], total: Tensor, scratch: Tensor) -> None:
    if not terms:
        total.zero_()
        return
    torch.mul(_widened(terms[0][0], scratch), terms[0][1], out=total)
    for block, factor in terms[1:]:
        total.add_(_widened(block, scratch), alpha=factor)


def _widened(block: Tensor, scratch: Tensor) -> Tensor:
    """``block`` in the accumulator's dtype, converted in the cache if necessary."""
    return block if block.dtype == scratch.dtype else scratch[: block.numel()].copy_(block)


def _contrast(blocks: Sequence[Tensor], factors: Sequence[float], total: Tensor, scratch: Tensor) -> Tensor:
    total = total[: blocks[0].numel()]
    _sum_up(
        [(block, factor) for block, factor in zip(blocks, factors, strict=True) if factor], total, scratch
    )
    return total


def _add_squares(squares: Tensor, difference: Tensor, bounds: Sequence[int], start: int) -> None:
    """Adds the block's sums of squares to the segments it touches; the block begins at element ``start``."""
    first = bisect_right(bounds, start)
    stop = start + difference.numel()
    edges = [start]
    for end in bounds[first:]:
        edges.append(min(end, stop))
        if end >= stop:
            break
    # Not torch.dot: it is twice as fast, but a plain fp32 sum (8e-6 off after 2^20 elements) whose last bits
    # depend on the memory's alignment. sum() adds pairwise (5e-9 off).
    difference.square_()
    for index, (left, right) in enumerate(pairwise(edges), start=first):
        squares[index] += difference[left - start : right - start].sum()
