"""The one pass over flat memory under every linear merge and every weight-space distance."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merge_callback.reduce import blocks
from merge_callback.reduce.blocks import accumulator_dtype
from merge_callback.reduce.dispatch import triton_serves

__all__ = ["accumulator_dtype", "one_pass"]


def one_pass(
    sources: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    out: Tensor | None = None,
    contrast: Sequence[float] | None = None,
    bounds: Sequence[int] = (),
) -> Tensor | None:
    """``blocks.one_pass``, where its arguments are explained, or the same on a GPU in one launch."""
    if triton_serves(*sources, *([] if out is None else [out])):
        from merge_callback.reduce import triton_kernels  # imports Triton

        return triton_kernels.one_pass(sources, weights, out, contrast, bounds)
    return blocks.one_pass(sources, weights, out, contrast, bounds)
