"""Selects the pass for given tensors: C on a CPU, Triton on a GPU, else PyTorch's own operations."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence, Sized
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from merge_callback.reduce import blocks, compiled
from merge_callback.reduce.passes import Elect, Outs, Pass, Row, Weights, rows_of

EAGER = os.environ.get("MERGE_CALLBACK_EAGER", "") not in ("", "0")
"""Whether to use only PyTorch's own operations, e.g. to rule out a kernel: ``MERGE_CALLBACK_EAGER=1``."""

NARROW = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Floating-point dtypes that are summed in fp32."""


@torch.no_grad()
def one_pass(
    sources: Sequence[Tensor],
    weights: Weights = None,
    out: Outs = None,
    contrast: Sequence[float] | None = None,
    bounds: Sequence[int] = (),
) -> Tensor | None:
    """Writes ``out = Σ weights[i] · sources[i]`` and sums ``(Σ contrast[i] · sources[i])²`` by segment.

    Each source is read once: all sums are formed while a part of it sits in registers or cache. A factor of
    0 leaves its source out, even if that holds NaN. An element is summed in the order of the sources, in
    fp32, or in fp64 if a source is fp64. Of K sums each has the bits that it has alone.

    Args:
        sources: N flat tensors of ``n`` elements, of any floating-point dtypes, on one device.
        weights: N factors, or K rows of N; ``None`` leaves ``out`` untouched (squares only).
        out: flat, ``n`` elements, any floating-point dtype; receives the one final cast. Must not overlap a
            source. For K rows, K of them, which must not overlap each other.
        contrast: N factors, or ``None``; −1 and 1 for two sources, and 0 for the others, give their distance.
        bounds: ends of the segments in elements, ascending, the last one ``n``; needed with ``contrast``.

    Returns:
        With ``contrast``: fp64 on the CPU, one sum of squares per segment. Else ``None``.

    Raises:
        ValueError: if the numbers of elements or of factors differ, or ``bounds`` do not end with ``n``.
    """
    rows = rows_of(weights, out)
    _check(sources, rows, weights, out, contrast, bounds)
    return _backend(sources, rows)(sources, weights, out, contrast, bounds)


def _backend(sources: Sequence[Tensor], rows: Sequence[Row]) -> Pass:
    """The fastest pass that takes these tensors; ``blocks`` takes all."""
    tensors = [*sources, *(row.out for row in rows)]
    if triton_serves(*tensors):
        from merge_callback.reduce import triton_kernels  # imports Triton

        return triton_kernels.one_pass
    if compiled_serves(*tensors):
        return compiled.one_pass
    return blocks.one_pass


def election(initial: Tensor, others: Sequence[Tensor], out: Tensor) -> Elect | None:
    """The pass that trims, elects and averages these task vectors; ``None`` if only PyTorch's can."""
    tensors = (initial, *others, out)
    if triton_serves(*tensors):
        from merge_callback.reduce import triton_ties  # imports Triton

        return triton_ties.elect
    return compiled.elect if compiled_serves(*tensors) else None


def compiled_serves(*tensors: Tensor) -> bool:
    """Whether the passes in C take these tensors."""
    return not EAGER and compiled.takes(tensors)


def triton_serves(*tensors: Tensor) -> bool:
    """Whether Triton's kernels take these tensors: contiguous, in ``NARROW``, on one CUDA device."""
    device = tensors[0].device
    if device.type != "cuda" or EAGER or not all(isinstance(t, Tensor) for t in tensors):
        return False
    return all(t.device == device and t.dtype in NARROW and t.is_contiguous() for t in tensors) and _runs_on(
        device
    )


@lru_cache
def _runs_on(device: torch.device) -> bool:
    """Tries one small merge: Triton may be missing, too old or without a C compiler, or the GPU too old."""
    # The interpreter reads host memory, so an address on a device would crash the process.
    if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") != "0":
        return False
    try:
        from merge_callback.reduce import triton_kernels

        ones, out = torch.ones(1, device=device), torch.empty(1, device=device)
        triton_kernels.one_pass([ones], [1.0], out, [1.0], [1])
    except Exception as error:
        warnings.warn(
            f"Triton does not run on {device} ({error!r}); merges there use PyTorch's operations instead, "
            "which read the snapshots block by block",
            stacklevel=2,
        )
        return False
    return True


def _check(
    sources: Sequence[Tensor],
    rows: Sequence[Row],
    weights: Weights,
    out: Outs,
    contrast: Sequence[float] | None,
    bounds: Sequence[int],
) -> None:
    """Refuses arguments with which a kernel would read or write beyond the tensors' memory."""
    size = sources[0].numel()
    outs = [out] if isinstance(out, Tensor) else out or []
    for tensor in (*sources, *outs):
        if tensor.numel() != size:
            raise ValueError(f"tensors must have equal numbers of elements, got {tensor.numel()} and {size}")
    given: list[Sized] = [row.weights for row in rows] or ([] if weights is None else [weights])
    named = [("weights", each) for each in given] + ([] if contrast is None else [("contrast", contrast)])
    for name, factors in named:
        if len(factors) != len(sources):
            raise ValueError(f"{name}: {len(factors)} factors for {len(sources)} sources; give one for each")
    if contrast is not None:
        _check_bounds(bounds, size)


def _check_bounds(bounds: Sequence[int], size: int) -> None:
    ends = [0, *bounds]
    if ends[-1] != size or ends != sorted(ends):
        raise ValueError(f"bounds={list(bounds[-8:])} must ascend from 0 to the {size} elements")
