"""The distances of all pairs of N checkpoints, from one read of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_callback.analysis.layer_groups import layer_groups
from merge_callback.analysis.tensor_blocks import BLOCK, as_reals, one_thread, shared_names, side_by_side
from merge_callback.diversity.distance import rms_per_tensor


@dataclass(frozen=True)
class PairwiseDistances:
    """The RMS distances of N checkpoints.

    Args:
        per_tensor: fp64 ``(N, N)`` by tensor: symmetric, 0 on the diagonal ("Practical Guidelines", App. C.2,
            eq. 4).
    """

    per_tensor: Mapping[str, Tensor]

    def model(self) -> Tensor:
        """The model's distances, ``(N, N)``: the mean over its tensors (eq. 5)."""
        return _mean(list(self.per_tensor.values()))

    def by_layer(self) -> dict[str, Tensor]:
        """The same mean over the tensors of each layer, and of each group outside the layers."""
        groups = layer_groups(self.per_tensor)
        return {group: _mean([self.per_tensor[n] for n in names]) for group, names in groups.items()}


@one_thread()
@torch.no_grad()
def pairwise_distances(
    checkpoints: Sequence[Mapping[str, Tensor]],
    *,
    labels: Sequence[object] | None = None,
    block: int = BLOCK,
) -> PairwiseDistances:
    """The RMS distances of all pairs of checkpoints; every checkpoint is read once.

    Args:
        checkpoints: N checkpoints of one model, tensors by name, on the CPU (usually views of mapped files).
            Tensors that are not floating-point do not count.
        labels: names of the checkpoints in errors, e.g. their paths; default: ``checkpoint 1`` ….
        block: elements of each checkpoint read at once. The result depends on it to fp64 rounding only.

    Raises:
        ValueError: for fewer than two checkpoints, or tensors that differ in name or shape.

    Example::

        >>> a, b = {"w": torch.zeros(4)}, {"w": torch.full((4,), 0.5)}
        >>> pairwise_distances([a, b]).model()[0, 1].item()
        0.5
    """
    if len(checkpoints) < 2:
        raise ValueError(f"distances need at least two checkpoints, got {len(checkpoints)}")
    checkpoints = as_reals(checkpoints)
    names = shared_names(checkpoints, labels or [f"checkpoint {i + 1}" for i in range(len(checkpoints))])
    return PairwiseDistances({name: _distances([c[name] for c in checkpoints], block) for name in names})


def consecutive(distances: Tensor, lag: int = 1) -> list[float]:
    """The distances between checkpoints ``lag`` apart: from 1 to 1 + lag, from 2 to 2 + lag, ….

    Args:
        distances: ``(N, N)``.
        lag: 1 … N − 1. The callback records a lag of 2.

    Raises:
        ValueError: if no two checkpoints are that far apart.
    """
    count = len(distances)
    if not 1 <= lag < count:
        raise ValueError(f"lag={lag} must lie in 1 … {count - 1}: there are {count} checkpoints")
    curve: list[float] = distances.diagonal(lag).tolist()
    return curve


def changes(curve: Sequence[float]) -> list[float]:
    """The percentage change of each value from the first, e.g. −80.0; NaN if the first is 0."""
    return [100 * (value / curve[0] - 1) if curve[0] else math.nan for value in curve]


def _distances(tensors: Sequence[Tensor], block: int) -> Tensor:
    """The RMS distances of one tensor, ``(N, N)``."""
    first, second = torch.tril_indices(len(tensors), len(tensors), -1)
    sums = torch.zeros(len(first), dtype=torch.float64)
    for rows in side_by_side(tensors, block):
        sums += torch.tensor(_squared_distances(rows), dtype=torch.float64)
    squares = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    squares[first, second] = squares[second, first] = sums
    return rms_per_tensor(squares, torch.tensor(tensors[0].numel()))


def _squared_distances(rows: Tensor) -> list[float]:
    """Σ (a − b)² of rows 1 and 0, 2 and 0, 2 and 1, …."""
    # Every pair's difference, not a Gram matrix: that is twice as fast, but would put two equal checkpoints
    # at some 1e-8 of their distance to the others.
    difference, squares = torch.empty_like(rows[0]), []
    for i, row in enumerate(rows):
        for other in rows[:i]:
            torch.sub(row, other, out=difference)
            squares.append(float(difference.dot(difference)))
    return squares


def _mean(matrices: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(matrices)).mean(0)
