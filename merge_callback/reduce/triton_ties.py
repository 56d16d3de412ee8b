"""Trim, elect and average on a GPU, in one launch: every source is read once, and no task vector is held."""
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from merge_callback.reduce.passes import Cut
from merge_callback.reduce.triton_sources import elements, load, on, table, written

BLOCK = 1024
"""Elements per program: 4 per thread, of θ_init, two sums and two counts."""

WARPS = 8
"""48 registers per thread on sm_90; 96 with 4 warps, and 8 elements per thread: half as many threads fit."""


@torch.no_grad()
def elect(
    initial: Tensor,
    others: Sequence[Tensor],
    out: Tensor,
    scale: float,
    cuts: Sequence[Cut],
    block: int = BLOCK,
) -> None:
    """Writes ``θ_init + λ · mean of the kept entries of the elected sign``, as ``Election`` elects them.

    It computes in fp32, in the order of the sources, and rounds each operation separately, so the result has
    the same bits as with PyTorch's own operations.

    Args:
        initial: θ_init, flat and contiguous, ``n`` elements, fp32, bf16 or fp16.
        others: the θ_i, like ``initial``, on one device; their task vectors are formed in registers.
        out: flat, contiguous, ``n`` elements, one of these dtypes; receives the one final cast.
        scale: λ.
        cuts: what is trimmed of each task vector.
        block: elements per program, a power of 2.
    """
    size = initial.numel()
    if not size:
        return
    ends, below, at_most = ([cut.end for cut in cuts], [c.below for c in cuts], [c.at_most for c in cuts])
    rows = table([initial, *others], ends, below, at_most)
    with on(initial.device):
        _elect_tile[(triton.cdiv(size, block),)](
            rows.integers, rows.factors, len(others), out, size, scale, rows.kind, rows.aligned, block,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    written(out)


@triton.jit(do_not_specialize=["count", "size", "scale"])
def _elect_tile(
    rows, factors, count, out, size, scale,
    kind: tl.constexpr, aligned: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Merges one tile."""
    offsets = elements(tl.program_id(0), block)
    if tl.program_id(0) + 1 < tl.num_programs(0):  # without a mask, each thread loads 16 bytes at once
        _merge(rows, factors, count, out, offsets, None, scale, kind, aligned, block)
    else:
        _merge(rows, factors, count, out, offsets, offsets < size, scale, kind, aligned, block)


@triton.jit
def _merge(
    rows, factors, count, out, offsets, inside, scale,
    kind: tl.constexpr, aligned: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    kinds, ends = rows + count + 1, rows + 2 * (count + 1)
    initial = load(tl.load(rows), tl.load(kinds), offsets, inside, kind, aligned)
    ayes = tl.zeros([block], tl.float32)
    noes = tl.zeros([block], tl.float32)
    positive = tl.zeros([block], tl.float32)
    negative = tl.zeros([block], tl.float32)
    for i in tl.range(0, count, loop_unroll_factor=2):
        theta = load(tl.load(rows + i + 1), tl.load(kinds + i + 1), offsets, inside, kind, aligned)
        before_end = offsets < tl.load(ends + i)
        cut = tl.where(before_end, tl.load(factors + i), tl.load(factors + count + i))
        entry = theta - initial
        entry = tl.where(tl.abs(entry) <= cut, 0.0, entry)
        # NaN is neither positive nor negative: it goes into both sums, as with clamp().
        positive += tl.where(entry < 0, 0.0, entry)
        negative += tl.where(entry > 0, 0.0, entry)
        ayes += tl.where((entry < 0) | (entry == 0), 0.0, 1.0)
        noes += tl.where((entry > 0) | (entry == 0), 0.0, 1.0)
    # Products instead of tl.where: infinite entries of both signs have to give NaN, as in PyTorch.
    elected = tl.where(positive + negative >= 0, 1.0, 0.0)
    number = tl.maximum(ayes * elected + noes * (1 - elected), 1.0)
    mean = tl.div_rn(positive * elected + negative * (1 - elected), number)
    tl.store(out + offsets, (mean * scale + initial).to(out.dtype.element_ty), mask=inside)
