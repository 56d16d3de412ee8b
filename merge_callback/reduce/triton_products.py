"""The inner products of all pairs of N flat tensors on a GPU, in one launch that reads every element once."""
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from merge_callback.reduce.triton_sources import Table, on, pointers, table

_PROGRAMS = 1024  # fixed, so that the last bit does not depend on the device's number of processors


@torch.no_grad()
def inner_products(tensors: Sequence[Tensor], block: int = 32, programs: int = _PROGRAMS) -> Tensor:
    """The inner products of all pairs of tensors, ``(N, N)``, fp64 on the CPU.

    Within a block the products are summed in fp32 (off by 1e-7 of the sum of their magnitudes), the blocks in
    fp64, always in the same order.

    Args:
        tensors: N flat contiguous tensors of ``n`` elements, fp32, bf16 or fp16, on one device. At most 64: a
            program holds N² sums in registers.
        block: elements of each tensor multiplied at once, a power of 2, at least 16.
        programs: number of programs; each takes a run of blocks.
    """
    count, size, device = len(tensors), tensors[0].numel(), tensors[0].device
    rows, width = table(tensors, ()), max(16, triton.next_power_of_2(count))
    per_program = triton.cdiv(triton.cdiv(size, block), programs)
    programs = triton.cdiv(size, block * per_program) if size else 0
    partials = torch.zeros(programs, width, width, dtype=torch.float64, device=device)
    if programs:
        with on(device):
            _launch(rows, partials, size, per_program, block)
    return partials.sum(0)[:count, :count].cpu()


def _launch(rows: Table, partials: Tensor, size: int, per_program: int, block: int) -> None:
    programs, width, _ = partials.shape
    _multiply[(programs,)](
        rows.integers, rows.sources, partials, size, per_program, rows.kind, rows.aligned, width, block,
        num_warps=4 if width < 64 else 16, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "size", "per_program"])
def _multiply(
    rows, count, partials, size, per_program,
    kind: tl.constexpr, aligned: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Sums the products of one run of blocks."""
    row = tl.arange(0, width)
    here = row < count
    addresses = tl.load(rows + row, mask=here, other=0)
    kinds = tl.load(rows + count + row, mask=here, other=0)
    total = tl.zeros([width, width], tl.float64)
    first = tl.program_id(0).to(tl.int64) * per_program * block
    offsets = first + tl.arange(0, block)
    stop = tl.minimum(first + per_program.to(tl.int64) * block, size)
    # Whole blocks need no mask by element: with one, no thread would load 16 bytes at once.
    for _ in range((stop - first) // block):
        total += _products(addresses, kinds, offsets, here[:, None], kind, aligned)
        offsets += block
    if (stop - first) % block != 0:
        inside = here[:, None] & (offsets < size)[None, :]
        total += _products(addresses, kinds, offsets, inside, kind, aligned)
    place = tl.program_id(0).to(tl.int64) * width * width
    tl.store(partials + place + row[:, None] * width + row[None, :], total)


@triton.jit
def _products(addresses, kinds, offsets, inside, kind: tl.constexpr, aligned: tl.constexpr):
    values = _load_rows(addresses, kinds, offsets, inside, kind, aligned)
    # Not the default precision: tensor cores would round the numbers to 10 bits (TF32) first.
    return tl.dot(values, tl.trans(values), input_precision="ieee").to(tl.float64)


@triton.jit
def _load_rows(addresses, kinds, offsets, inside, kind: tl.constexpr, aligned: tl.constexpr):
    """The elements of all sources, fp32 ``(width, block)``, 0 where masked out."""
    if kind == 0:
        values = _read_rows(addresses, offsets, inside, tl.float32, aligned)
    elif kind == 1:
        values = _read_rows(addresses, offsets, inside, tl.bfloat16, aligned)
    elif kind == 2:
        values = _read_rows(addresses, offsets, inside, tl.float16, aligned)
    else:  # each element is loaded once: it is masked out in the loads of other dtypes
        values = _read_rows(addresses, offsets, inside & (kinds == 0)[:, None], tl.float32, aligned)
        values += _read_rows(addresses, offsets, inside & (kinds == 1)[:, None], tl.bfloat16, aligned)
        values += _read_rows(addresses, offsets, inside & (kinds == 2)[:, None], tl.float16, aligned)
    return values


@triton.jit
def _read_rows(addresses, offsets, inside, dtype: tl.constexpr, aligned: tl.constexpr):
    places = pointers(addresses, dtype, aligned)[:, None] + offsets[None, :]
    return tl.load(places, mask=inside, other=0.0).to(tl.float32)
