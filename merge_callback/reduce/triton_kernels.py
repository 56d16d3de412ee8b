"""The one pass over flat memory on a GPU: one launch, whatever the number of sources.

Every program sums one tile in registers. If squares are wanted, it writes one partial sum for each segment
that its tile touches; a second, tiny launch adds up those of each segment in a fixed order, in fp64. There
are no atomics: equal inputs give equal bits. But the compiler chooses the order within a tile: the last bits
of the squares (never of the merge) may differ between kinds of GPU, or with dtype and alignment of sources.
"""
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from merge_callback.reduce.passes import Outs, Row, Weights, rows_of
from merge_callback.reduce.triton_sources import KINDS, elements, load, on, pointers, sent, table, written

BLOCK = 1024
"""Elements per program: 8 per thread, of each of the sums."""

ROWS = 8
"""Sums that one launch makes: 64 registers per thread for their elements."""


@torch.no_grad()
def one_pass(
    sources: Sequence[Tensor],
    weights: Weights = None,
    out: Outs = None,
    contrast: Sequence[float] | None = None,
    bounds: Sequence[int] = (),
    block: int = BLOCK,
) -> Tensor | None:
    """Does the same as ``blocks.one_pass``, for tensors that ``triton_serves``.

    Products are summed with fused multiply–add, which rounds once, as PyTorch's own CUDA kernels do.

    Args:
        sources: N flat contiguous tensors of ``n`` elements, fp32, bf16 or fp16, on one device.
        weights: N factors, or K rows of N; ``None`` leaves ``out`` untouched.
        out: flat, contiguous, ``n`` elements, one of these dtypes; receives the one final cast. Or K of them;
            all of one dtype are written in one read of the sources for each 8.
        contrast: N factors, or ``None``.
        bounds: ends of the segments in elements, ascending, the last one ``n``.
        block: elements per program, a power of 2.

    Returns:
        With ``contrast``: fp64 on the CPU, one sum of squares per segment. Else ``None``.
    """
    size, device, rows = sources[0].numel(), sources[0].device, rows_of(weights, out)
    squares = torch.zeros(len(bounds) if contrast is not None else 0, dtype=torch.float64, device=device)
    if size and (rows or len(squares)):
        with on(device):
            measured: Sequence[float] | None = contrast
            for part in _launches(rows):
                _launch(sources, part, measured, bounds if measured is not None else (), squares, block)
                measured = None
    return None if contrast is None else squares.cpu()


def _launches(rows: Sequence[Row]) -> list[list[Row]]:
    """Up to ``ROWS`` sums of one dtype each; one without any, if only squares are wanted."""
    alike = [[row for row in rows if row.out.dtype == dtype] for dtype in {row.out.dtype: 0 for row in rows}]
    return [part[i : i + ROWS] for part in alike for i in range(0, len(part), ROWS)] or [[]]


def _launch(
    sources: Sequence[Tensor],
    rows: Sequence[Row],
    contrast: Sequence[float] | None,
    bounds: Sequence[int],
    squares: Tensor,
    block: int,
) -> None:
    count = len(sources)
    factors = contrast if contrast is not None else [0.0] * count
    given = [row.weights for row in rows] or [[0.0] * count]
    # Sources that take no part in any sum are not read at all.
    used = [i for i, each in enumerate(zip(*given, factors, strict=True)) if any(each)] or [0]
    tiles, segments = triton.cdiv(sources[0].numel(), block), len(bounds)
    # Tile t and segment s use place t + s: along the tensor both only grow, so no two pairs share a place.
    partials = torch.empty(tiles + segments, dtype=torch.float32, device=squares.device)
    taken, measure = [sources[i] for i in used], [factors[i] for i in used]
    begins = _first_segments(bounds, tiles, block, squares.device) if segments else squares
    if len(rows) > 1:
        height = triton.next_power_of_2(len(rows))
        padded = [*given, *[[0.0] * count] * (height - len(rows))]
        weights = [each[i] for i in used for each in padded]
        addresses = [row.out.data_ptr() for row in (*rows, *rows[:1] * (height - len(rows)))]
        rows_sent = table(taken, [*bounds, *addresses], measure, weights)
        _sum_rows[(tiles,)](
            rows_sent.integers, rows_sent.factors, rows_sent.sources, begins, partials, segments, len(rows),
            sources[0].numel(), rows_sent.kind, rows_sent.aligned, KINDS[rows[0].out.dtype],
            all(address % 16 == 0 for address in addresses), segments > 0, height, block,
            enable_fp_fusion=True,
        )  # fmt: skip
    else:
        out = rows[0].out if rows else partials
        rows_sent = table(taken, bounds, [given[0][i] for i in used], measure)
        _sum_tile[(tiles,)](
            rows_sent.integers, rows_sent.factors, rows_sent.sources, out, begins, partials,
            sources[0].numel(), rows_sent.kind, rows_sent.aligned, bool(rows), segments > 0, block,
            enable_fp_fusion=True,
        )  # fmt: skip
    for row in rows:
        written(row.out)
    if segments:
        _sum_segment[(segments,)](
            rows_sent.integers, 2 * rows_sent.sources, partials, squares, block, 1024, enable_fp_fusion=True
        )


def _first_segments(bounds: Sequence[int], tiles: int, block: int, device: torch.device) -> Tensor:
    """For each tile the segment of its first element; a search in every program would hold up short ones."""
    ends = sent(bounds, torch.int64, device)
    return torch.searchsorted(ends, torch.arange(tiles, device=device) * block, right=True, out_int32=True)


@triton.jit(do_not_specialize=["count", "segments", "rows", "size"])
def _sum_rows(
    table, factors, count, begins, partials, segments, rows, size,
    kind: tl.constexpr, aligned: tl.constexpr, written: tl.constexpr, lined_up: tl.constexpr,
    measures: tl.constexpr, height: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Writes a tile of each weighted sum, and the squares of its contrast by segment."""
    offsets = elements(tl.program_id(0), block)
    outs = table + 2 * count + segments
    if tl.program_id(0) + 1 < tl.num_programs(0):
        other = _several(
            table, factors, count, outs, rows, offsets, None, kind, aligned, written, lined_up, measures,
            height, block,
        )  # fmt: skip
    else:
        other = _several(
            table, factors, count, outs, rows, offsets, offsets < size, kind, aligned, written, lined_up,
            measures, height, block,
        )  # fmt: skip
    if measures:
        _store_partials(table + 2 * count, begins, partials, size, offsets, other * other, block)


@triton.jit
def _several(
    table, factors, count, outs, rows, offsets, inside,
    kind: tl.constexpr, aligned: tl.constexpr, written: tl.constexpr, lined_up: tl.constexpr,
    measures: tl.constexpr, height: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Writes the weighted sums of the elements that are inside, and returns their contrast."""
    row = tl.arange(0, height)
    total = tl.zeros([height, block], tl.float32)
    other = tl.zeros([block], tl.float32)
    for i in tl.range(0, count):
        values = load(tl.load(table + i), tl.load(table + count + i), offsets, inside, kind, aligned)
        weight = tl.load(factors + count + i * height + row)[:, None]
        total = tl.where(weight != 0, total + weight * values[None, :], total)
        if measures:
            factor = tl.load(factors + i)
            other = tl.where(factor != 0, other + factor * values, other)
    address = tl.load(outs + row)
    if written == 0:
        places, values = pointers(address, tl.float32, lined_up), total
    elif written == 1:
        places, values = pointers(address, tl.bfloat16, lined_up), total.to(tl.bfloat16)
    else:
        places, values = pointers(address, tl.float16, lined_up), total.to(tl.float16)
    real = (row < rows)[:, None]
    here = real if inside is None else real & inside[None, :]
    tl.store(places[:, None] + offsets[None, :], values, mask=here)
    return other


@triton.jit(do_not_specialize=["count", "size"])
def _sum_tile(
    rows, factors, count, out, begins, partials, size,
    kind: tl.constexpr, aligned: tl.constexpr, merges: tl.constexpr, measures: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Writes a tile's weighted sum, and the squares of its contrast by segment."""
    offsets = elements(tl.program_id(0), block)
    if tl.program_id(0) + 1 < tl.num_programs(0):
        # No mask: with one, which may end anywhere, no thread loads 16 bytes at once.
        other = _sums(rows, factors, count, out, offsets, None, kind, aligned, merges, measures, block)
    else:
        inside = offsets < size
        other = _sums(rows, factors, count, out, offsets, inside, kind, aligned, merges, measures, block)
    if measures:
        _store_partials(rows + 2 * count, begins, partials, size, offsets, other * other, block)


@triton.jit
def _sums(
    rows, factors, count, out, offsets, inside,
    kind: tl.constexpr, aligned: tl.constexpr, merges: tl.constexpr, measures: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Writes the weighted sum of the elements that are inside, and returns their contrast."""
    total = tl.zeros([block], tl.float32)
    other = tl.zeros([block], tl.float32)
    for i in tl.range(0, count, loop_unroll_factor=4):
        values = load(tl.load(rows + i), tl.load(rows + count + i), offsets, inside, kind, aligned)
        # A source may take part in one sum only, and its NaN must not reach the other: 0 times it is NaN.
        if merges:
            weight = tl.load(factors + i)
            total = tl.where(weight != 0, total + weight * values, total)
        if measures:
            factor = tl.load(factors + count + i)
            other = tl.where(factor != 0, other + factor * values, other)
    if merges:
        tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)
    return other


@triton.jit
def _store_partials(bounds, begins, partials, size, offsets, squares, block: tl.constexpr):
    """Sums a tile's squares by the segments it touches."""
    tile = tl.program_id(0).to(tl.int64)
    begin = tile * block
    stop = tl.minimum(begin + block, size)
    segment = tl.load(begins + tile).to(tl.int64)
    while begin < stop:
        end = tl.load(bounds + segment)
        here = (offsets >= begin) & (offsets < end)  # beyond the tensor the squares are 0
        tl.store(partials + tile + segment, tl.sum(tl.where(here, squares, 0.0)))
        begin = tl.maximum(begin, end)
        segment += 1


@triton.jit(do_not_specialize=["first_bound"])
def _sum_segment(rows, first_bound, partials, squares, block: tl.constexpr, chunk: tl.constexpr):
    """Adds up one segment's partial sums, always in the same order."""
    segment = tl.program_id(0).to(tl.int64)
    begin = tl.load(rows + first_bound + segment - 1, mask=segment > 0, other=0)
    end = tl.load(rows + first_bound + segment)
    total = tl.zeros([chunk], tl.float64)
    place = begin // block
    stop = tl.where(end > begin, (end + block - 1) // block, place)  # an empty segment has no tiles
    while place < stop:
        tiles = place + tl.arange(0, chunk)
        total += tl.load(partials + segment + tiles, mask=tiles < stop, other=0.0).to(tl.float64)
        place += chunk
    tl.store(squares + segment, tl.sum(total))
