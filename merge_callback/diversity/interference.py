"""How much task vectors get in each other's way: sign conflict, overlap, magnitude ratio and variance.

"Less Is More: Undertraining Experts Improves Model Upcycling", App. I. A task vector is
``τ_i = θ_i − θ_init``, and ``τ̃_i`` is τ_i with only its top k % by magnitude kept. An entry is active where
``τ̃_i`` is not 0, so that tensors that were not trained have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from operator import add
from typing import Literal

import torch
from torch import Tensor

from merge_callback.diversity.tensor_blocks import BLOCK, one_thread, shared_names, side_by_side
from merge_callback.diversity.top_magnitude import Blocks, keep_top, thresholds

_CACHED = 1 << 12  # columns whose N·(N−1)/2 ratios are formed at once


@dataclass(frozen=True)
class Counts:
    """Everything the measures need to know of N pruned task vectors; those of their parts add up.

    Args:
        overlap: int64 ``(N, N)``: entries active in both; on the diagonal, active entries.
        conflicts: int64 ``(N, N)``: those of them whose signs differ.
        ratios: fp64 ``(N, N)``: over the overlap, the sum of the larger magnitude over the smaller.
        union: entries active in any vector.
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
    """Counts what N task vectors have in common; every checkpoint is read three times.

    Args:
        checkpoints: θ_1 … θ_N, N ≥ 2, tensors by name, on the CPU (views of mapped files, as a rule).
        base: θ_init.
        top: k, the percentage of entries that are kept: ``max(1, ⌊k·n/100⌋)`` of n. Of equal magnitudes those
            of lower index.
        scope: k % of each tensor, or of the whole model with ``"global"``.
        labels: what errors call the base and each checkpoint; default: ``the base``, ``checkpoint 1`` ….
        block: elements of each checkpoint read at once. The result depends on it to fp64 rounding only.

    Raises:
        ValueError: for fewer than two checkpoints, a ``top`` outside (0, 100], tensors that differ in name or
            shape, a task vector that is 0 everywhere or not finite.
    """
    _check(len(checkpoints), top, scope)
    models = [base, *checkpoints]
    labels = labels or ["the base", *(f"checkpoint {i + 1}" for i in range(len(checkpoints)))]
    names = shared_names(models, labels)
    readers = {name: partial(_task_vectors, [m[name] for m in models], block) for name in names}
    sizes = {name: base[name].numel() for name in readers if base[name].numel()}
    if scope == "global":
        parts = [(sum(sizes.values()), _chained([readers[name] for name in sizes]), "the model")]
    else:
        parts = [(size, readers[name], f"tensor {name!r}") for name, size in sizes.items()]
    counts = reduce(add, (_count_part(blocks, size, top, what) for size, blocks, what in parts))
    _check_moved(counts, labels[1:])
    return counts


def count(pruned: Tensor) -> Counts:
    """The counts of a block of N pruned task vectors, ``(N, any size)``."""
    # In one run's task vectors the same entries tend to be large: most columns are 0 throughout.
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

    As a rule both have the same number, and the matrix is symmetric. It is not where fewer than k % of a
    tensor moved at all. Two independent vectors reach k %.
    """
    return 100 * counts.overlap.double() / counts.overlap.diagonal()[:, None]


def magnitude_ratio(counts: Counts) -> Tensor:
    """Per pair ``(N, N)``: the mean of max(|τ̃_1|, |τ̃_2|) / min(|τ̃_1|, |τ̃_2|) where both are active.

    NaN for a pair that has no such entry.
    """
    return counts.ratios / counts.overlap


def variance(counts: Counts) -> float:
    """The mean of (1/N) Σ τ̃_i² over all entries that are active in any of the N."""
    return counts.squares / (len(counts.overlap) * counts.union)


def pair_mean(measure: Tensor) -> float:
    """The mean over all ordered pairs of two different vectors; of those that have a value."""
    return float(measure[~torch.eye(len(measure), dtype=torch.bool)].nanmean())


def chance(top: float) -> tuple[float, float]:
    """The sign conflict and the overlap, in %, of vectors that have nothing to do with each other."""
    return 100 * top / (400 - 2 * top), top


def _count_part(blocks: Blocks, size: int, top: float, what: str) -> Counts:
    """Prunes each vector by one threshold and counts."""
    try:
        threshold, ties = thresholds(blocks, max(1, int(top * size / 100)))
    except ValueError as error:
        raise ValueError(f"{what}: {error} in a task vector") from None
    return reduce(add, map(count, _pruned(blocks, threshold, ties)))


def _pruned(blocks: Blocks, threshold: Tensor, ties: Tensor) -> Iterator[Tensor]:
    for block in blocks():
        pruned, ties = keep_top(block, threshold, ties)
        yield pruned


def _task_vectors(tensors: Sequence[Tensor], block: int) -> Iterator[Tensor]:
    """``θ_i − θ_init`` in fp32 blocks ``(N, ≤ block)``; θ_init is the first of the tensors."""
    for rows in side_by_side(tensors, block):
        yield (rows[1:] - rows[0]).float()


def _chained(readers: Sequence[Callable[[], Iterator[Tensor]]]) -> Blocks:
    return lambda: chain.from_iterable(read() for read in readers)


def _ratios(magnitudes: Tensor) -> Tensor:
    """Σ max / min of each two rows over the columns where neither is 0."""
    inverses = torch.where(magnitudes > 0, 1 / magnitudes, 0.0)
    sums = torch.diag((magnitudes > 0).sum(1).double())
    for i in range(1, len(magnitudes)):
        # Where one of the two is 0, so are both products: the overlap needs no mask.
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
