"""How much task vectors interfere: sign conflict, overlap, magnitude ratio and variance.

"Less Is More: Undertraining Experts Improves Model Upcycling", App. I. A task vector is
``τ_i = θ_i − θ_init``, and ``τ̃_i`` is τ_i with only its top k % by magnitude kept. An entry is active if
``τ̃_i`` is not 0, so tensors that were not trained have no active entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Literal

import torch
from torch import Tensor

from merge_callback.analysis.tensor_blocks import BLOCK, as_reals, one_thread, shared_names, side_by_side
from merge_callback.analysis.top_magnitude import keep_top, thresholds
from merge_callback.merging.census import Part

_CACHED = 1 << 12  # columns whose N·(N−1)/2 ratios are formed at once


@dataclass(frozen=True)
class Counts:
    """The counts of N pruned task vectors that all measures are computed from; counts of parts add up.

    Args:
        overlap: int64 ``(N, N)``: entries active in both; on the diagonal, active entries.
        conflicts: int64 ``(N, N)``: entries of the overlap whose signs differ.
        ratios: fp64 ``(N, N)``: the sum over the overlap of larger magnitude / smaller magnitude.
        union: number of entries active in any vector.
        squares: the sum of all ``τ̃²``.
    """

    overlap: Tensor
    conflicts: Tensor
    ratios: Tensor
    union: int
    squares: float

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.overlap + other.overlap,
            self.conflicts + other.conflicts,
            self.ratios + other.ratios,
            self.union + other.union,
            self.squares + other.squares,
        )


@one_thread()
@torch.no_grad()
def interference(
    checkpoints: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
    top: float = 20.0,
    *,
    scope: Literal["tensor", "global"] = "tensor",
    labels: Sequence[object] | None = None,
    block: int = BLOCK,
) -> Counts:
    """Counts what N task vectors have in common; usually every checkpoint is read twice.

    Args:
        checkpoints: θ_1 … θ_N, N ≥ 2, tensors by name, on the CPU (usually views of mapped files).
        base: θ_init.
        top: k, the percentage of entries that are kept: ``max(1, ⌊k·n/100⌋)`` of n. Of equal magnitudes,
            those with lower indices are kept.
        scope: ``"tensor"`` keeps k % of each tensor, ``"global"`` k % of the whole model.
        labels: names of the base and of each checkpoint in errors; default: ``the base``, ``checkpoint 1`` ….
        block: elements of each checkpoint read at once. The result depends on it to fp64 rounding only.

    Raises:
        ValueError: for fewer than two checkpoints, a ``top`` outside (0, 100], tensors that differ in name or
            shape, a task vector that is 0 everywhere or not finite.
    """
    _check(len(checkpoints), top, scope)
    base, *checkpoints = models = as_reals([base, *checkpoints])
    labels = labels or ["the base", *(f"checkpoint {i + 1}" for i in range(len(checkpoints)))]
    names = shared_names(models, labels)
    tensors = {name: [m[name] for m in models] for name in names if base[name].numel()}
    if scope == "global":
        groups = [(list(tensors.values()), "the model")]
    else:
        groups = [([each], f"tensor {name!r}") for name, each in tensors.items()]
    counts = reduce(add, (_count_group(group, top, block, what) for group, what in groups))
    _check_moved(counts, labels[1:])
    return counts


@one_thread()
@torch.no_grad()
def count_tensor(tensors: Sequence[Tensor], top: float = 20.0) -> Counts:
    """The counts of one tensor's task vectors, of which any may be 0 everywhere.

    Args:
        tensors: that of θ_init, then those of the N ≥ 2 checkpoints, on the CPU.
        top: the percentage of entries that are kept.

    Raises:
        ValueError: for entries that are not finite.
    """
    return _count_group([tensors], top, BLOCK, "a tensor")


def count(pruned: Tensor) -> Counts:
    """The counts of a block of N pruned task vectors, ``(N, any size)``."""
    # In one run's task vectors the same entries tend to be large, so most columns are all 0.
    vectors = pruned[:, (pruned != 0).any(0)].double()
    signs = vectors.sign()
    active = signs.abs()
    overlap = active @ active.T
    return Counts(
        overlap=overlap.long(),
        conflicts=((overlap - signs @ signs.T) / 2).long(),  # agreeing − conflicting = signs @ signs.T
        ratios=reduce(add, map(_ratios, torch.split(vectors.abs(), _CACHED, dim=1))),
        union=vectors.shape[1],
        squares=float(vectors.square().sum()),
    )


def sign_conflict(counts: Counts) -> Tensor:
    """Per pair ``(N, N)``, in %: entries with opposite signs among those active in either.

    An entry that was pruned from one of the two has no sign there, so it conflicts with nothing. Two
    independent vectors of k % reach ``100 · p / (4 − 2p)``, p = k/100 (5.6 for 20 %).
    """
    active = counts.overlap.diagonal()
    either = active[:, None] + active - counts.overlap
    return 100 * counts.conflicts.double() / either


def overlap(counts: Counts) -> Tensor:
    """Per pair ``(N, N)``, in %: entries active in both among those active in the first (the row).

    Usually both have the same number, and the matrix is symmetric. It is not if fewer than k % of a tensor
    moved at all. Two independent vectors reach k %.
    """
    return 100 * counts.overlap.double() / counts.overlap.diagonal()[:, None]


def magnitude_ratio(counts: Counts) -> Tensor:
    """Per pair ``(N, N)``: the mean of max(|τ̃_1|, |τ̃_2|) / min(|τ̃_1|, |τ̃_2|) over entries active in both.

    NaN for a pair without such an entry.
    """
    return counts.ratios / counts.overlap


def variance(counts: Counts) -> float:
    """The mean of (1/N) Σ τ̃_i² over all entries that are active in any of the N."""
    return counts.squares / (len(counts.overlap) * counts.union)


def pair_mean(measure: Tensor) -> float:
    """The mean over all ordered pairs of two different vectors that have a value."""
    return float(measure[~torch.eye(len(measure), dtype=torch.bool)].nanmean())


def chance(top: float) -> tuple[float, float]:
    """The expected sign conflict and overlap, in %, of independent vectors."""
    return 100 * top / (400 - 2 * top), top


def _count_group(group: Sequence[Sequence[Tensor]], top: float, block: int, what: str) -> Counts:
    """Prunes each vector by one threshold and counts.

    Args:
        group: for each tensor, that of θ_init and of each checkpoint.
        top: see ``interference``.
        block: elements read at once.
        what: name of the group in errors.
    """
    vectors = [[_part(each[0], each[i], block) for each in group] for i in range(1, len(group[0]))]
    kept = max(1, int(top * sum(each[0].numel() for each in group) / 100))
    counts = reduce(add, map(count, _pruned(group, block, *thresholds(vectors, kept))))
    if not math.isfinite(counts.squares):
        raise ValueError(f"{what}: there are infinite or NaN entries in a task vector")
    return counts


def _part(initial: Tensor, theta: Tensor, block: int) -> Part:
    """A task vector of one tensor, in fp32."""

    def blocks(start: int, stop: int) -> Iterator[Tensor]:
        return (rows[0] for rows in _task_vectors((initial, theta), block, start, stop))

    is_flat = initial.is_contiguous() and theta.is_contiguous()
    difference = (theta.view(-1), initial.view(-1)) if is_flat else None
    return Part(initial.numel(), torch.float32, initial.device, blocks, difference=difference)


def _pruned(
    group: Sequence[Sequence[Tensor]], block: int, threshold: Tensor, ties: Tensor
) -> Iterator[Tensor]:
    for tensors in group:
        for vectors in _task_vectors(tensors, block):
            pruned, ties = keep_top(vectors, threshold, ties)
            yield pruned


def _task_vectors(
    tensors: Sequence[Tensor], block: int, start: int = 0, stop: int | None = None
) -> Iterator[Tensor]:
    """``θ_i − θ_init`` in fp32 blocks ``(N, ≤ block)``; θ_init is the first of the tensors."""
    for rows in side_by_side(tensors, block, start, stop):
        yield (rows[1:] - rows[0]).float()


def _ratios(magnitudes: Tensor) -> Tensor:
    """Σ max / min of all pairs of rows, over the columns in which neither is 0."""
    inverses = torch.where(magnitudes > 0, 1 / magnitudes, 0.0)
    sums = torch.diag((magnitudes > 0).sum(1).double())
    for i in range(1, len(magnitudes)):
        # If one of the two is 0, both products are 0, so the overlap needs no mask.
        larger = torch.maximum(magnitudes[:i] * inverses[i], inverses[:i] * magnitudes[i]).sum(1)
        sums[i, :i] = sums[:i, i] = larger
    return sums


def _check(vectors: int, top: float, scope: str) -> None:
    if vectors < 2:
        raise ValueError(f"interference needs at least two task vectors, got {vectors}")
    if not 0 < top <= 100:
        raise ValueError(f"top={top:g} must be a percentage above 0 and at most 100")
    if scope not in ("tensor", "global"):
        raise ValueError(f"scope={scope!r} must be 'tensor' or 'global'")


def _check_moved(counts: Counts, labels: Sequence[object]) -> None:
    for active, label in zip(counts.overlap.diagonal().tolist(), labels, strict=True):
        if not active:
            raise ValueError(f"{label} equals the base, so its task vector is 0; leave it out")
