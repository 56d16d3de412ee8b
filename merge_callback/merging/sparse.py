"""Methods that sparsify the task vectors before they combine them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from merge_callback.merging.census import Part
from merge_callback.merging.method import Inputs, MergeMethod, Need, Trajectory, register_method
from merge_callback.merging.randomness import Stream
from merge_callback.merging.task_vectors import TaskVectors, warn_of_plain_sum
from merge_callback.merging.threshold import (
    Search,
    Threshold,
    search_kth_largest,
    search_tie_ends,
    together,
)
from merge_callback.reduce.dispatch import election
from merge_callback.reduce.passes import Cut
from merge_callback.reduce.ranges import in_ranges

_AT_ONCE = 128  # thresholds that processes search for together; each search holds a sixtieth of the elements


@register_method("ties", reference="arXiv 2306.01708; Practical Guidelines (ACL 2026), appendix B.2")
@dataclass(frozen=True)
class Ties(MergeMethod):
    """Trim, elect signs, and average: ``θ_init + λ · mean of the entries of the elected sign``.

    Each task vector keeps its ``max(1, ⌊d·n⌋)`` entries of largest magnitude; of equal ones those with the
    lowest indices. An element's elected sign is that of the sum of its kept entries; 0 counts as +. The kept
    entries of this sign are averaged over their number.

    No temporary tensor of full size is made: the thresholds take one pass over blocks of the task vectors
    (usually two above 2^26 elements), and the merge takes another, which writes each block of ``out`` once.

    Args:
        density: d, the share of the entries that is kept.
        scale: λ.
        scope: ``"tensor"`` keeps the largest entries of each tensor, ``"global"`` those of the whole model,
            as the authors' code does.

    Raises:
        ValueError: for a ``density`` outside (0, 1], a ``scale`` that is not finite, an unknown ``scope``.
    """

    needs: ClassVar[tuple[Need, ...]] = ("task vectors", "global sums")

    density: float = 0.8
    scale: float = 1.0
    scope: Literal["tensor", "global"] = "tensor"

    def __post_init__(self) -> None:
        _check("ties", self.density, self.scale)
        if self.scope not in ("tensor", "global"):
            raise ValueError(f"ties: scope={self.scope!r} must be 'tensor' or 'global'")

    def survey(self, model: Iterable[Inputs], trajectory: Trajectory) -> Any:
        """What each task vector of each tensor keeps, by the tensor's name.

        With ``scope="tensor"`` in a single process, ``merge`` finds it itself.
        """
        if self.scope == "global":
            return kept_of_all({inputs.name: TaskVectors(inputs) for inputs in model}, self.density)
        shared = {inputs.name: TaskVectors(inputs) for inputs in model if inputs.shard}
        return kept_of_each(shared, self.density) if shared else None

    def merge(self, inputs: Inputs, out: Tensor, trajectory: Trajectory, survey: Any = None) -> None:
        """Trims and elects block by block."""
        vectors = TaskVectors(inputs, hold=True)
        whole = kept_of_all({inputs.name: vectors}, self.density) if survey is None else survey
        kept = whole[inputs.name]
        if elect := election(vectors.initial, vectors.others, out):
            cuts = [Cut(*_largest(k.magnitude, torch.float32), k.end) for k in kept]
            return elect(vectors.initial, vectors.others, out, self.scale, cuts)

        def trim(which: int, block: Tensor, begin: int) -> Tensor:
            return kept[which].trim(block, begin)

        _combine(vectors, out, self.scale, lambda: Election(vectors), trim)


@register_method("dare", reference="arXiv 2311.03099, section 3")
@dataclass(frozen=True)
class Dare(MergeMethod):
    """Drop and rescale: drop each entry of a task vector with probability ``1 − d``, divide the rest by d.

    The rest is combined as in ``task_arithmetic``, or elected and averaged as in ``ties``. Which entries are
    dropped depends only on the seed, the snapshot's step, the tensor's name and the element.

    Args:
        density: d, the share of the entries that is kept on average. The paper names no default; this is that
            of ``ties``.
        scale: λ.
        normalize: takes the mean of the task vectors; ``False``: their plain sum. Must stay on with ``ties``.
        ties: elects signs.
        seed: seed of the random choice.

    Raises:
        ValueError: for a ``density`` outside (0, 1], a ``scale`` that is not finite, ``ties`` with
            ``normalize=False``.
    """

    needs: ClassVar[tuple[Need, ...]] = ("task vectors", "randomness")

    density: float = 0.8
    scale: float = 1.0
    normalize: bool = True
    ties: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check("dare", self.density, self.scale)
        if self.ties and not self.normalize:
            raise ValueError(
                "dare: normalize=False has no meaning with ties=True, which averages; leave it out"
            )
        if not self.normalize:
            warn_of_plain_sum("dare")

    def merge(self, inputs: Inputs, out: Tensor, trajectory: Trajectory, survey: Any = None) -> None:
        """Drops, rescales and combines block by block."""
        vectors = TaskVectors(inputs)
        piece = inputs.shard.piece if inputs.shard else None
        streams = [Stream(self.seed, step, inputs.name, piece) for step in vectors.steps(trajectory)]

        def thin(which: int, block: Tensor, begin: int) -> Tensor:
            drawn = streams[which].uniform(begin, begin + len(block)).to(block.device)
            return block.mul_(drawn.lt_(self.density)).div_(self.density)

        _combine(
            vectors, out, self.scale, lambda: Election(vectors) if self.ties else self._sum(vectors), thin
        )

    def _sum(self, vectors: TaskVectors) -> Sum:
        return Sum(vectors, over=len(vectors) if self.normalize else 1)


@dataclass(frozen=True)
class Kept:
    """What a task vector keeps: entries larger than ``magnitude``, and equal ones before index ``end``."""

    magnitude: float
    end: int

    def trim(self, block: Tensor, begin: int) -> Tensor:
        """Sets entries that are not kept to 0, in place, in the block that begins at element ``begin``."""
        below, at_most = _largest(self.magnitude, block.dtype)
        cut = min(max(0, self.end - begin), block.numel())
        if cut:
            torch.hardshrink(kept := block[:cut], below, out=kept)
        if cut < block.numel():
            torch.hardshrink(rest := block[cut:], at_most, out=rest)
        return block


def kept_of_all(vectors: Mapping[str, TaskVectors], density: float) -> dict[str, list[Kept]]:
    """What each task vector of each tensor keeps, by the tensor's name; one threshold for all tensors."""
    total = sum(v.whole_size for v in vectors.values())
    k = _number_kept(total, density)
    count = max(map(len, vectors.values()), default=0)
    searches = [_search_kept(list(vectors.values()), which, k) for which in range(count)]
    shard = next((v.shard for v in vectors.values()), None)
    found = together(searches, shard.ranks.exchange) if shard else together(searches)
    return {name: [kept[i] for kept in found] for i, name in enumerate(vectors)}


def kept_of_each(vectors: Mapping[str, TaskVectors], density: float) -> dict[str, list[Kept]]:
    """The same with a threshold for each tensor, for tensors that are split over processes.

    Many tensors are searched at once: with many processes, an exchange's latency costs more than its content.
    """
    kept: dict[str, list[Kept]] = {}
    waiting = list(vectors.items())
    while waiting:
        count = max(1, _AT_ONCE // max(1, len(waiting[0][1])))
        batch, waiting = waiting[:count], waiting[count:]
        searches = [
            _search_kept([v], which, _number_kept(v.whole_size, density))
            for _, v in batch
            for which in range(len(v))
        ]
        assert batch[0][1].shard is not None
        found = iter(together(searches, batch[0][1].shard.ranks.exchange))
        kept |= {name: [next(found)[0] for _ in range(len(v))] for name, v in batch}
    return kept


def _number_kept(size: int, density: float) -> int:
    """How many of a task vector's ``size`` entries are kept; 0 if all are."""
    k = max(1, math.floor(density * size))
    return k if k < size else 0


def _search_kept(vectors: Sequence[TaskVectors], which: int, k: int) -> Search[list[Kept]]:
    """What one task vector of each tensor keeps; a ``k`` of 0 keeps all of it."""
    parts = _parts(vectors, which)
    # A threshold of 0 keeps everything, too, since zeros add nothing.
    threshold = (yield from search_kth_largest(parts, k)) if k else Threshold(0.0, 0, 0)
    ends = yield from search_tie_ends(parts, threshold)
    return [Kept(threshold.magnitude, end) for end in ends]


class Election:
    """Averages the entries of each element that have its elected sign.

    Positive and negative entries are summed and counted separately, one task vector after the other, so the
    order, and with it the last bit, depends on nothing else. The elected sign is that of both sums together.
    """

    def __init__(self, vectors: TaskVectors) -> None:
        self._sums = [vectors.scratch() for _ in range(4)]
        # The narrowest dtype that can count the task vectors.
        dtype = torch.uint8 if len(vectors) < 256 else torch.int32
        self._counts = [torch.empty_like(full, dtype=dtype) for full in self._sums[:2]]

    def open(self, size: int) -> None:
        """Begins a block of ``size`` elements."""
        self._for, self._against, self._free, self._number = (full[:size] for full in self._sums)
        self._ayes, self._noes = (full[:size] for full in self._counts)
        for total in (self._for, self._against, self._ayes, self._noes):
            total.zero_()

    def add(self, entries: Tensor) -> None:
        """Adds one task vector's entries; those that are not kept are 0."""
        positive = torch.clamp(entries, min=0, out=self._free)
        self._for.add_(positive)
        _count(positive, self._ayes)
        negative = entries.clamp_(max=0)
        self._against.add_(negative)
        _count(negative, self._noes)

    def result(self) -> Tensor:
        """The averages; 0 for elements without a kept entry."""
        elected = torch.add(self._for, self._against, out=self._free).ge_(0)
        self._for.mul_(elected)
        number = self._number.copy_(self._ayes).mul_(elected)
        lost = elected.neg_().add_(1)
        self._for.add_(self._against.mul_(lost))
        number.add_(self._against.copy_(self._noes).mul_(lost))
        return self._for.div_(number.clamp_(min=1))


class Sum:
    """Adds the entries of each element, and divides by ``over``."""

    def __init__(self, vectors: TaskVectors, over: int) -> None:
        self._whole, self._over = vectors.scratch(), max(1, over)

    def open(self, size: int) -> None:
        """Begins a block of ``size`` elements."""
        self._total = self._whole[:size].zero_()

    def add(self, entries: Tensor) -> None:
        """Adds one task vector's entries."""
        self._total.add_(entries)

    def result(self) -> Tensor:
        """The sum, divided."""
        return self._total.div_(self._over)


def _combine(
    vectors: TaskVectors,
    out: Tensor,
    scale: float,
    combination: Callable[[], Election | Sum],
    thin: Callable[[int, Tensor, int], Tensor],
) -> None:
    """Writes ``θ_init + λ · combination`` of task vectors that ``thin(which, block, begin)`` sparsifies."""

    def merge_range(start: int, stop: int) -> None:
        combined, initial, difference = combination(), vectors.scratch(), vectors.scratch()
        for begin, end in vectors.spans(start, stop):
            here = vectors.initial_block(begin, end, initial)
            combined.open(end - begin)
            for which in range(len(vectors)):
                combined.add(thin(which, vectors.block(which, begin, end, here, difference), begin))
            # Not add_ with alpha, which rounds once or twice depending on the place in the block.
            out[begin:end].copy_(combined.result().mul_(scale).add_(here))

    in_ranges(vectors.size, vectors.device, merge_range)


def _count(entries: Tensor, counts: Tensor) -> None:
    """Adds 1 for each entry that is not 0."""
    if counts.device.type == "cpu":  # NumPy's comparison is ten times as fast as PyTorch's
        numbers = counts.numpy()
        numbers += (entries.numpy() != 0).view(np.uint8)  # a view: bools would be cast
    else:
        counts.add_(entries != 0)


def _parts(vectors: Iterable[TaskVectors], which: int) -> list[Part]:
    """The ``which``-th task vector of every tensor, all in the widest of their dtypes."""
    wide = torch.float64 if any(v.dtype == torch.float64 for v in vectors) else torch.float32
    return [
        Part(
            v.size,
            wide,
            v.device,
            partial(_widened, v, which, wide),
            v.shard.piece if v.shard else None,
            (v.others[which], v.initial) if wide == torch.float32 else None,
            partial(_sampled, v, which, wide),
        )
        for v in vectors
    ]


def _widened(vectors: TaskVectors, which: int, dtype: torch.dtype, start: int, stop: int) -> Iterator[Tensor]:
    blocks = vectors.blocks(which, start, stop)
    return blocks if vectors.dtype == dtype else (block.to(dtype) for block in blocks)


def _sampled(
    vectors: TaskVectors, which: int, dtype: torch.dtype, starts: range, length: int
) -> Iterator[Tensor]:
    return (piece.to(dtype) for piece in vectors.sample(which, starts, length))


@lru_cache
def _largest(magnitude: float, dtype: torch.dtype) -> tuple[float, float]:
    """The largest numbers of ``dtype`` below the magnitude (which may be of a wider one), and up to it."""
    kind = np.float64 if dtype == torch.float64 else np.float32
    at_most = kind(magnitude)
    if float(at_most) > magnitude:  # float(): NumPy would compare in the narrower dtype
        at_most = np.nextafter(at_most, kind(0))
    below = at_most if float(at_most) < magnitude else np.nextafter(at_most, kind(0))
    return float(below), float(at_most)


def _check(name: str, density: float, scale: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"{name}: density={density} must lie in (0, 1]; the papers use 0.8 and less")
    if not math.isfinite(scale):
        raise ValueError(f"{name}: scale={scale} must be a finite number")
