"""Merging the window: which snapshots, by which method, and the one pass over their arenas."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from merge_callback.diversity import rms_per_tensor
from merge_callback.merging import LinearMethod, MergeMethod, Trajectory
from merge_callback.merging.power_iteration import recompute, vectors_of
from merge_callback.snapshots.arena import Arena, all_finite
from merge_callback.snapshots.arena_merge import in_common, merge_arenas, merge_tensors
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.deltas import flat_tensors
from merge_callback.snapshots.live_merge import HalfRestoredError, merge_into_all
from merge_callback.snapshots.lora_merge import merge_factors, product_pairs
from merge_callback.snapshots.snapshot import NonFiniteSnapshotError, Snapshot
from merge_callback.snapshots.window import Window


class NonFiniteMergeError(ValueError):
    """A merge that holds NaN or Inf, though its snapshots held none when they were taken."""


@dataclass
class Merge:
    """A merge of part of the window: its tensors in the model's dtypes, and how they came about.

    It owns its arena until it is published, if it is to be. Whoever hands it in for that sets ``published``,
    which waits for it. The next merge is written to the same memory. ``weights`` are the snapshots' if the
    method is linear, else ``None``. ``copied`` names what is the newest snapshot's, ``recomputed`` the
    singular vectors of spectral norm that were found again for the merged weights. ``lora_products`` counts
    the pairs of LoRA factors that were merged by their product.
    """

    arena: Arena
    method: MergeMethod
    snapshots: list[Snapshot]
    weights: list[float] | None
    copied: list[str]
    lora_products: int = 0
    published: Callable[[], object] | None = field(default=None, repr=False, compare=False)
    recomputed: list[str] = field(default_factory=list)

    def wait(self) -> None:
        """Waits until nobody reads the arena any more."""
        if self.published is not None:
            self.published()

    @cached_property
    def step(self) -> int:
        """The optimizer step of the newest snapshot in it."""
        return self.snapshots[-1].step


class WindowMerger:
    """Merges a window and measures its diversity, both in one pass if both are wanted.

    Args:
        window: the snapshots.
        methods: the method of each phase, by the phase's name.
        diversity_lag: how many snapshots apart the pair lies whose distance is measured.
        exclude: patterns of names that are copied, not averaged.
        lora: ``"delta"`` merges the factors of LoRA adapters by their product, ``"factors"`` each for itself.
        last: how many of the newest snapshots of a segment are merged at most; ``None`` for all.
    """

    def __init__(
        self,
        window: Window,
        methods: Mapping[str, MergeMethod],
        diversity_lag: int,
        exclude: Sequence[str] = (),
        lora: str = "delta",
        last: int | None = None,
    ) -> None:
        self._last = last
        self.window, self.methods, self.lag, self.exclude = window, methods, diversity_lag, exclude
        self.sharding, self.ranks = window.store.sharding, window.ranks
        self.first_rms: float | None = None  # what the diversity is compared with
        self.diversity: dict[str, Any] | None = None
        self.rms_by_tensor: dict[str, float] = {}  # that it is the mean of, until the next measurement
        self._numel = {name: s.numel for name, (_, s) in window.store.whole.places.items()}
        self._vectors = vectors_of(self._numel)
        self._merge: Merge | None = None
        self._made: Merge | None = None  # the last one, which may still be published, though forgotten
        self._out: Arena | None = None
        self._pairs = product_pairs(self.sharding.wholes) if lora == "delta" else []

    def measure(self, model: ModelTensors, merge: bool) -> None:
        """Reads the window once after an append: the newest pair's diversity and, if asked, the merge.

        Each rank reads what it keeps; of the diversity one number per tensor is summed over all ranks.
        """
        self._merge = self.diversity = None
        self.rms_by_tensor = {}
        pair = self.window.pair(self.lag)
        try:
            squares = self.ranks.agreed(partial(self._measured, model, pair, merge))
        except BaseException:
            self.forget()  # else the ranks that have one would not merge again with those that have none
            raise
        if squares is not None and pair is not None:
            sums = self.ranks.total(torch.tensor(list(squares.values()), dtype=torch.float64))
            self._record_diversity(list(squares), sums, pair)

    def forget(self) -> None:
        """Drops the merge that was made: the window's snapshots turned out to be of another segment."""
        self._merge = None

    def constant(self, model: ModelTensors) -> set[str]:
        """Names of what is frozen, a buffer or excluded, and the same in the oldest and newest snapshot.

        All ranks have to ask.
        """
        return (
            self._copied(model, [self.window.snapshots[0], self.window.snapshots[-1]]) - self._vectors.keys()
        )

    def current(self, model: ModelTensors) -> Merge | None:
        """The merge of the window as it is; ``None`` with fewer than two snapshots to merge."""
        if self._merge is not None and (part := self._merge.arena.frozen) and part not in self.window.held():
            self._merge = None  # its file was spoilt
        if self._merge is None:
            self._merged(model, None)
        return self._merge

    def merge_into(
        self, model: ModelTensors, snapshots: Sequence[Snapshot], method: LinearMethod
    ) -> list[float]:
        """Overwrites the live model with the merge of ``snapshots``; returns the normalised weights.

        Each rank merges what it keeps, in place, and hands it to those that hold the same. All ranks have to.

        Raises:
            ValueError: if the model's tensors are others by now; none is overwritten.
            RemoteError: if they are on another rank.
            HalfRestoredError: if some are overwritten and others are not, on any rank.
        """

        def prepare() -> tuple[Mapping[str, Tensor], list[float], set[str]]:
            own = self.sharding.own(model.tensors)
            snapshots[-1].arena.check(own)
            weights = method.weights_along(_trajectory(snapshots))
            return own, weights, self._copied(model, snapshots)

        own, weights, copied = self.ranks.agreed(prepare)
        products = self.ranks.agreed(partial(self._products, method, snapshots, copied))
        arenas = self._arenas(snapshots[-1])
        factors = self._factors(snapshots, weights)[: len(arenas)]
        try:
            merge_into_all(self.ranks, factors, arenas, own, copied, products)
            self.sharding.spread(model.tensors)
        except Exception as error:
            raise HalfRestoredError(f"the live weights are overwritten in part only: {error!r}") from error
        return weights

    def _measured(
        self, model: ModelTensors, pair: tuple[Snapshot, Snapshot] | None, merge: bool
    ) -> dict[str, float] | None:
        """Merges if asked; returns the squared distances of ``pair``, of what trains, by tensor."""
        squares = self._merged(model, pair) if merge else None
        if pair is None:
            return None
        if squares is None:
            squares = self._distance(pair)
        made = self._merge
        if made is not None and (made.snapshots[0], made.snapshots[-1]) == pair:
            ignored = model.buffers.union(made.copied)
        else:
            ignored = self._copied(model, pair) | model.buffers
        return {n: squares[n] for n in self._numel if n in squares and n not in ignored}

    def _merged(self, model: ModelTensors, pair: tuple[Snapshot, Snapshot] | None) -> dict[str, float] | None:
        """Sets the merge and returns the squared distances of ``pair``; ``None`` with nothing to merge."""
        snapshots = self.window.segment()[-self._last if self._last else None :]
        if len(snapshots) < 2:
            return None
        method = self.methods[snapshots[-1].phase]
        snapshots = [*method.select(snapshots)]
        copied = self._copied(model, snapshots)  # first: all ranks have a say in it
        if self._made is not None:
            self._made.wait()
        self._out = self._room(snapshots[-1].arena, copied)
        trajectory, weights = _trajectory(snapshots), None
        if isinstance(method, LinearMethod):
            weights = method.weights_along(trajectory)
            squares = merge_arenas(
                self._factors(snapshots, weights),
                self._arenas(),
                self._out,
                copied,
                self._factors(pair, (-1.0, 1.0)) if pair else None,
                self.window.snapshots.index(snapshots[-1]),
            )
        else:
            chains = [self._arenas(snapshot) for snapshot in snapshots]
            apart = copied.union(*self._pairs)  # the factors are overwritten
            merge_tensors(method, chains, self._out, apart, trajectory, self.sharding)
            squares = self._distance(pair) if pair else {}
        products = self._products(method, snapshots, copied)
        for name, part in products.items():
            self._out.flat(name).copy_(part)
        recomputed = self._recompute(self._out, copied, model.matching(self.exclude))
        self._check_finite(self._out, snapshots)
        self._merge = self._made = Merge(
            self._out,
            method,
            snapshots,
            weights,
            sorted(copied.difference(recomputed)),
            lora_products=len(products) // 2,
            recomputed=recomputed,
        )
        return squares

    def _products(
        self, method: MergeMethod, snapshots: Sequence[Snapshot], copied: Collection[str]
    ) -> dict[str, Tensor]:
        """This rank's parts of LoRA's factors, merged by their products, but those that are copied."""
        pairs = [pair for pair in self._pairs if not {*pair} & {*copied}]
        given = [partial(flat_tensors, self._arenas(snapshot)) for snapshot in snapshots]
        return merge_factors(pairs, given, method, _trajectory(snapshots), self.sharding)

    def _recompute(self, merged: Arena, copied: Collection[str], excluded: Collection[str]) -> list[str]:
        """Finds spectral norm's vectors for the merged weights; on several ranks, none has a whole weight."""
        if self.ranks.size > 1:
            return []
        vectors = [
            names
            for name, names in self._vectors.items()
            if name not in excluded and names[0] not in copied and name not in merged.shared
        ]
        return recompute(vectors, merged.tensor)

    def _room(self, newest: Arena, copied: Collection[str]) -> Arena:
        """Room for the merge. What the newest snapshot gives, out of what it has in common, stays there."""
        shared = newest.shared.intersection(copied)
        if self._out is None or self._out.shared != shared:
            whole = self.window.store.layout
            layout = whole.only(whole.names - shared) if shared else whole
            self._out = Arena.empty(layout.native, newest.buffer.device)
        return self._out.reused().sharing(newest.frozen, shared)

    def _check_finite(self, merged: Arena, snapshots: Sequence[Snapshot]) -> None:
        # A map shows what its file holds by now, and anybody may write to that.
        try:
            self.window.store.check_finite(merged)
            if merged.frozen is not None:
                self.window.store.check_finite(merged.frozen.arena)
        except NonFiniteSnapshotError as error:
            steps = ", ".join(str(snapshot.step) for snapshot in snapshots)
            raise NonFiniteMergeError(f"in the merge of the snapshots of steps {steps} {error}") from None

    def _distance(self, pair: tuple[Snapshot, Snapshot]) -> dict[str, float]:
        return merge_arenas(None, self._arenas(), contrast=self._factors(pair, (-1.0, 1.0)))

    def _arenas(self, last: Snapshot | None = None) -> list[Arena]:
        """Those of the window's snapshots from the oldest on, up to ``last``: it may build on all of them."""
        snapshots = self.window.snapshots
        return [s.arena for s in snapshots[: snapshots.index(last) + 1 if last else None]]

    def _factors(self, snapshots: Sequence[Snapshot], factors: Sequence[float]) -> list[float]:
        """One factor for each of the window's snapshots: 0 for those that none was given for."""
        steps = [snapshot.step for snapshot in self.window.snapshots]
        every = [0.0] * len(steps)
        for snapshot, factor in zip(snapshots, factors, strict=True):
            every[steps.index(snapshot.step)] = factor
        return every

    def _copied(self, model: ModelTensors, snapshots: Sequence[Snapshot]) -> set[str]:
        """Names of the tensors that are taken from the newest snapshot.

        They are the excluded ones; frozen parameters and buffers that do not change, which keep their bits
        (the mean of equal values is not always that value in floating point, and a mask of infinities has
        none); buffers that hold NaN or Inf in some snapshot, as they have no mean (a threshold before the
        first validation); and the singular vectors of spectral norm.
        """
        oldest, newest = snapshots[0], snapshots[-1]
        shared = in_common([oldest.arena, newest.arena])
        static = [n for n in self._numel if n in model.frozen or n in model.buffers]
        if not static:
            return model.matching(self.exclude)  # nor is there a vector, which is a buffer
        asked = [name for name in static if name not in shared]
        before = flat_tensors(self._arenas(oldest), asked)
        after = flat_tensors(self._arenas(newest), asked)
        changed = [name not in shared and not torch.equal(before[name], after[name]) for name in static]
        averaged = {n for n, is_other in zip(static, changed, strict=True) if is_other and n in model.buffers}
        unbounded = set[str]()
        for snapshot in snapshots if averaged else ():
            values = flat_tensors(self._arenas(snapshot), averaged)
            unbounded |= {name for name, tensor in values.items() if not all_finite(tensor[:])}
        # A part may be constant, or finite, though the whole is not.
        told = torch.tensor([changed, [name in unbounded for name in static]]).int()
        counts = self.ranks.total(told).T.tolist()
        kept = {name for name, count in zip(static, counts, strict=True) if not count[0] or count[1]}
        return kept | model.matching(self.exclude) | self._vectors.keys()

    def _record_diversity(
        self, names: Sequence[str], squares: Tensor, pair: tuple[Snapshot, Snapshot]
    ) -> None:
        numel = torch.tensor([self._numel[name] for name in names], dtype=torch.int64)
        values = rms_per_tensor(squares, numel)
        self.rms_by_tensor, rms = dict(zip(names, values.tolist(), strict=True)), float(values.mean())
        if self.first_rms is None:
            self.first_rms = rms
        older, newer = pair
        self.diversity = {
            "rms": rms,
            "change_percent": 100 * (rms / self.first_rms - 1) if self.first_rms else 0.0,
            "lag": self.lag,
            "steps": [older.step, newer.step],
            "tokens": [older.tokens, newer.tokens],
        }


def _trajectory(snapshots: Sequence[Snapshot]) -> Trajectory:
    return Trajectory(positions(snapshots), [snapshot.step for snapshot in snapshots])


def positions(snapshots: Sequence[Snapshot]) -> list[float]:
    """Where snapshots lie along the run: their tokens; their steps if tokens are not counted."""
    tokens = [float(s.tokens) for s in snapshots if s.tokens is not None]
    if len(tokens) == len(snapshots) and all(b > a for a, b in pairwise(tokens)):
        return tokens
    return [float(snapshot.step) for snapshot in snapshots]
