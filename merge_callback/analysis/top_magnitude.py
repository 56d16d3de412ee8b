"""Finds the k entries of largest magnitude of vectors, without sorting or holding them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_callback.merging.census import Part
from merge_callback.merging.threshold import search_kth_largest, together


def thresholds(vectors: Sequence[Sequence[Part]], count: int) -> tuple[Tensor, Tensor]:
    """The thresholds of N vectors with which their ``count`` entries of largest magnitude are kept.

    Args:
        vectors: the parts of each vector, in fp32.
        count: 1 … size of a vector.

    Returns:
        The smallest magnitude kept, fp32 ``(N,)``, and how many entries of exactly that magnitude to keep,
        int64 ``(N,)``: those with lower indices first.
    """
    found = together([search_kth_largest(parts, count) for parts in vectors])
    return torch.tensor([each.magnitude for each in found]), torch.tensor([each.kept for each in found])


def keep_top(block: Tensor, threshold: Tensor, ties: Tensor) -> tuple[Tensor, Tensor]:
    """A block in which all entries except those to keep are 0.

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
