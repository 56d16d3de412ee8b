"""Counts the magnitudes above, between and at two bounds on a GPU, and picks those between.

PyTorch's operations would make a boolean tensor for each count and wait for each result.
"""
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from merge_callback.reduce.triton_sources import elements, on

BLOCK = 2048
"""Elements per program."""


@torch.no_grad()
def split(bits: Tensor, low: int, high: int, block: int = BLOCK) -> tuple[int, int, int, Tensor]:
    """The numbers of bits above ``high``, equal to it, and equal to ``low`` (if lower), and the bits between.

    The host waits once. A second launch picks those between, in their order.

    Args:
        bits: bits of fp32 magnitudes, int32, flat and contiguous.
        low: not negative.
        high: not less than ``low``.
        block: elements per program, a power of 2.

    Returns:
        The three numbers, and the bits between, int32 on the device.
    """
    size, tiles = bits.numel(), triton.cdiv(bits.numel(), block)
    counts = torch.zeros(4, tiles, dtype=torch.int32, device=bits.device)
    with on(bits.device):
        if size:
            _count[(tiles,)](bits, counts, size, low, high, block, enable_fp_fusion=False)
        above, at_high, at_low, number = counts.sum(1).tolist()
        between = torch.empty(number, dtype=torch.int32, device=bits.device)
        if number:
            ends = counts[3].cumsum(0, dtype=torch.int64)
            _pick[(tiles,)](bits, ends, between, size, low, high, block, enable_fp_fusion=False)
    return above, at_high, at_low, between


@triton.jit(do_not_specialize=["size", "low", "high"])
def _count(bits, counts, size, low, high, block: tl.constexpr):
    """Counts one tile."""
    offsets = elements(tl.program_id(0), block)
    values = tl.load(bits + offsets, mask=offsets < size, other=-1)  # -1 is below every magnitude
    place, tiles = counts + tl.program_id(0), tl.num_programs(0).to(tl.int64)
    tl.store(place, tl.sum((values > high).to(tl.int32)))
    tl.store(place + tiles, tl.sum((values == high).to(tl.int32)))
    tl.store(place + 2 * tiles, tl.sum(((values == low) & (values < high)).to(tl.int32)))
    tl.store(place + 3 * tiles, tl.sum(((values > low) & (values < high)).to(tl.int32)))


@triton.jit(do_not_specialize=["size", "low", "high"])
def _pick(bits, ends, between, size, low, high, block: tl.constexpr):
    """Writes a tile's elements between after those of the previous tiles."""
    offsets = elements(tl.program_id(0), block)
    values = tl.load(bits + offsets, mask=offsets < size, other=-1)
    picked = (values > low) & (values < high)
    place = tl.cumsum(picked.to(tl.int32), 0) - 1
    tile = tl.program_id(0).to(tl.int64)
    begin = tl.load(ends + tile - 1, mask=tile > 0, other=0)
    tl.store(between + begin + place, values, mask=picked)
