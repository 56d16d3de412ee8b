"""Weighted sum and squared distances of flat tensors, in one cache-blocked pass."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 1 << 19
"""Elements per block: the fp32 accumulator (2 MiB) and one block of input stay in the last-level cache.
On a 2-core EPYC, N=10, blocks of 2^19 to 2^20 were the fastest of 2^16 … 2^21. The split is fixed, so the
partial sums of a distance, and so its last bit, depend on nothing but the layout."""

_BLOCK_ALONE = 1 << 17
"""The same where nothing but a weighted sum is wanted, and PyTorch has one thread: both fit into the
second-level cache, which makes it a third faster. The sum of an element is the same in any block."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a floating-point dtype is summed in: fp64 for fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def one_pass(
    sources: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    out: Tensor | None = None,
    pair: tuple[Tensor, Tensor] | None = None,
    bounds: Sequence[int] = (),
) -> Tensor | None:
    """Writes ``out = Σ weights[i] · sources[i]`` and sums ``(pair[0] − pair[1])²`` by segment.

    Each block of every source is read once: the sum and the distance are formed while it sits in cache.

    Args:
        sources: N flat tensors of ``n`` elements, one floating-point dtype, one device. Summed in order.
        weights: N factors; ``None`` leaves ``out`` untouched (distances only).
        out: flat, ``n`` elements, any floating-point dtype; receives the one final cast.
        pair: two flat tensors of ``n`` elements (as a rule two of ``sources``), or ``None``.
        bounds: ends of the segments in elements, ascending, the last one ``n``; needed with ``pair``.

    Returns:
        With ``pair``: fp64 on the CPU, one sum of squared differences a segment. Else ``None``.
    """
    reference = sources[0] if pair is None else pair[0]
    acc_dtype = accumulator_dtype(reference.dtype)
    block = min(BLOCK, _BLOCK_ALONE) if pair is None and torch.get_num_threads() == 1 else BLOCK
    accumulator, scratch = _buffers(reference, acc_dtype, min(block, reference.numel()))
    squares = torch.zeros(len(bounds), dtype=torch.float64, device=reference.device)
    for start in range(0, reference.numel(), block):
        stop = min(start + block, reference.numel())
        if weights is not None and out is not None:
            blocks = [source[start:stop] for source in sources]
            _weighted_sum(blocks, weights, out[start:stop], accumulator[: stop - start], scratch)
        if pair is not None:
            difference = _difference(pair[0][start:stop], pair[1][start:stop], scratch, accumulator)
            _add_squares(squares, difference, bounds, start)
    return None if pair is None else squares.cpu()


def _buffers(reference: Tensor, dtype: torch.dtype, size: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return (
            torch.empty(size, dtype=dtype, device=reference.device),
            torch.empty(size, dtype=dtype, device=reference.device),
        )


def _weighted_sum(
    blocks: Sequence[Tensor], weights: Sequence[float], out: Tensor, accumulator: Tensor, scratch: Tensor
) -> None:
    # Straight into the output where it has the accumulator's dtype: one write less per block.
    total = out if out.dtype == accumulator.dtype else accumulator
    torch.mul(_widened(blocks[0], scratch), weights[0], out=total)
    for block, weight in zip(blocks[1:], weights[1:], strict=True):
        total.add_(_widened(block, scratch), alpha=weight)
    if total is not out:
        out.copy_(total)


def _widened(block: Tensor, scratch: Tensor) -> Tensor:
    """``block`` in the accumulator's dtype; converted inside the cache where it has another."""
    return block if block.dtype == scratch.dtype else scratch[: block.numel()].copy_(block)


def _difference(a: Tensor, b: Tensor, scratch: Tensor, free: Tensor) -> Tensor:
    return torch.sub(_widened(a, scratch), _widened(b, free), out=scratch[: a.numel()])


def _add_squares(squares: Tensor, difference: Tensor, bounds: Sequence[int], start: int) -> None:
    """Adds the block's sums of squares to the segments it touches; the block begins at element ``start``."""
    first = bisect_right(bounds, start)
    stop = start + difference.numel()
    edges = [start]
    for end in bounds[first:]:
        edges.append(min(end, stop))
        if end >= stop:
            break
    # Not torch.dot: twice as fast, but a plain fp32 sum (8e-6 off after 2^20 elements) whose last bits depend
    # on the memory's alignment. sum() adds pairwise (5e-9 off).
    difference.square_()
    for index, (left, right) in enumerate(pairwise(edges), start=first):
        squares[index] += difference[left - start : right - start].sum()
