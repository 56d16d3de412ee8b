"""A table of addresses, by which Triton's kernels reach any number of tensors of any dtypes.

A table on the device, unlike kernel arguments, has no limit of 4 KiB, and one compiled kernel serves every
number of sources. A kernel is compiled again only for another dtype, a mixture of dtypes, and sources that do
not begin at a multiple of 16 bytes (these are read element by element, others 16 bytes per thread at once).
"""
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers of the dtypes in the table."""

MIXED = 3
"""The kind of sources of several dtypes; the table has the dtype of each."""


class Table(NamedTuple):
    """Sources as a kernel gets them.

    Args:
        integers: int64 on the device: N addresses, N kinds, and further integers for the kernel.
        factors: fp32 on the device, N times as many as there are lists of factors.
        sources: N.
        kind: the kind of all sources, or ``MIXED``. A compile-time constant of the kernel.
        aligned: whether all begin at a multiple of 16 bytes. A compile-time constant of the kernel.
    """

    integers: Tensor
    factors: Tensor
    sources: int
    kind: int
    aligned: bool


def table(sources: Sequence[Tensor], integers: Sequence[int], *factors: Sequence[float]) -> Table:
    """The table of sources that are contiguous, of the dtypes in ``KINDS`` and on one device.

    The sources have to live until the kernel is launched; freeing them later follows the stream's order.

    Args:
        sources: N flat tensors, at least one.
        integers: further integers, placed after the addresses and the kinds.
        *factors: lists of N numbers each, placed one after the other.
    """
    addresses, kinds = [s.data_ptr() for s in sources], [KINDS[s.dtype] for s in sources]
    device = sources[0].device
    return Table(
        sent([*addresses, *kinds, *integers], torch.int64, device),
        sent([factor for each in factors for factor in each], torch.float32, device),
        len(sources),
        kinds[0] if len(set(kinds)) == 1 else MIXED,
        all(address % 16 == 0 for address in addresses),
    )


def sent(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor on a device, without waiting for it."""
    # Without non_blocking the host would wait for all queued work of the stream. CUDA copies pageable
    # memory to a buffer of its own before the call returns.
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the current one, since Triton launches on that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def written(out: Tensor) -> None:
    """Notifies autograd that a kernel wrote to a tensor, as PyTorch's own operations do."""
    if not out.is_inference():  # inference tensors have no version
        torch.autograd.graph.increment_version(out)


@triton.jit
def elements(tile: tl.tensor, block: tl.constexpr):
    """The indices of a tile's elements, int64 because a large arena has more than 2^31."""
    return tile.to(tl.int64) * block + tl.arange(0, block)


@triton.jit
def pointers(address: tl.tensor, dtype: tl.constexpr, aligned: tl.constexpr):
    """Addresses as pointers."""
    typed = address.to(tl.pointer_type(dtype))
    return tl.multiple_of(typed, 16) if aligned else typed


@triton.jit
def load(address, own, offsets, mask, kind: tl.constexpr, aligned: tl.constexpr):
    """One source's elements in fp32, 0 where masked out; ``own`` is its kind, used if kinds are mixed."""
    if kind == 0:
        values = read(address, offsets, mask, tl.float32, aligned)
    elif kind == 1:
        values = read(address, offsets, mask, tl.bfloat16, aligned)
    elif kind == 2:
        values = read(address, offsets, mask, tl.float16, aligned)
    elif own == 0:
        values = read(address, offsets, mask, tl.float32, aligned)
    elif own == 1:
        values = read(address, offsets, mask, tl.bfloat16, aligned)
    else:
        values = read(address, offsets, mask, tl.float16, aligned)
    return values


@triton.jit
def read(address, offsets, mask, dtype: tl.constexpr, aligned: tl.constexpr):
    """Elements of a known dtype in fp32."""
    places = pointers(address, dtype, aligned) + offsets
    values = tl.load(places) if mask is None else tl.load(places, mask=mask, other=0.0)
    return values.to(tl.float32)
