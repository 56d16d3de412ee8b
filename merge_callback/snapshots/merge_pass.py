"""Making merges of a window: the linear ones in one pass over its arenas, others tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from merge_callback.merging import LinearMethod, MergeMethod
from merge_callback.merging.power_iteration import recompute, vectors_of
from merge_callback.snapshots.arena import Arena, all_finite
from merge_callback.snapshots.arena_merge import Sum, in_common, merge_arenas, merge_tensors
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.deltas import flat_tensors
from merge_callback.snapshots.live_merge import HalfRestoredError, merge_into_all
from merge_callback.snapshots.lora_merge import merge_factors, product_pairs
from merge_callback.snapshots.merge import Merge, NonFiniteMergeError, trajectory_of
from merge_callback.snapshots.snapshot import NonFiniteSnapshotError, Snapshot
from merge_callback.snapshots.window import Window


@dataclass
class Room:
    """Memory of a merge, and the last one in it, which may still be published, though forgotten."""

    out: Arena | None = None
    made: Merge | None = None


@dataclass
class Plan:
    """A merge that is to be made; ``weights`` are the snapshots' if the method is linear, else ``None``."""

    name: str
    method: MergeMethod
    snapshots: list[Snapshot]
    weights: list[float] | None
    copied: set[str]
    excluded: set[str]
    room: Room
    out: Arena


class MergePass:
    """Makes the merges that are planned, from the arenas of a window's snapshots.

    All ranks have to make the same ones; each makes its parts.

    Args:
        window: the snapshots.
        exclude: patterns of names that are copied, not averaged.
        lora: ``"delta"`` merges the factors of LoRA adapters by their product, ``"factors"`` each for itself.
    """

    def __init__(self, window: Window, exclude: Sequence[str], lora: str) -> None:
        self._window, self._exclude = window, exclude
        self._sharding, self._ranks = window.store.sharding, window.ranks
        self.numel = {name: s.numel for name, (_, s) in window.store.whole.places.items()}
        self.vectors = vectors_of(self.numel)
        self._pairs = product_pairs(self._sharding.wholes) if lora == "delta" else []

    def copied(self, model: ModelTensors, snapshots: Sequence[Snapshot]) -> set[str]:
        """Names of the tensors that are taken from the newest snapshot.

        They are the excluded ones; frozen parameters and buffers that do not change, which keep their bits
        (the mean of equal values is not always that value in floating point, and a mask of infinities has
        none); buffers that hold NaN or Inf in some snapshot, as they have no mean (a threshold before the
        first validation); and the singular vectors of spectral norm.
        """
        oldest, newest = snapshots[0], snapshots[-1]
        shared = in_common([oldest.arena, newest.arena])
        static = [n for n in self.numel if n in model.frozen or n in model.buffers]
        if not static:
            return model.matching(self._exclude)  # nor is there a vector, which is a buffer
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
        counts = self._ranks.total(told).T.tolist()
        kept = {name for name, count in zip(static, counts, strict=True) if not count[0] or count[1]}
        return kept | model.matching(self._exclude) | self.vectors.keys()

    def plan(
        self,
        model: ModelTensors,
        name: str,
        method: MergeMethod,
        snapshots: list[Snapshot],
        copied: set[str],
        room: Room,
    ) -> Plan:
        """What a merge takes, by a method and under a name, in a room that nobody reads any more."""
        along = trajectory_of(snapshots)
        weights = method.weights_along(along) if isinstance(method, LinearMethod) else None
        room.out = self._out(room.out, snapshots[-1].arena, copied)
        excluded = model.matching(self._exclude)
        return Plan(name, method, snapshots, weights, copied, excluded, room, room.out)

    def reduce(self, plans: Sequence[Plan], pair: tuple[Snapshot, Snapshot] | None) -> dict[str, float]:
        """Makes what is linear of merges, and measures a pair's squared distances, by tensor, in one pass."""
        rows = [
            Sum(self._factors(plan.snapshots, plan.weights), plan.out, plan.copied)
            for plan in plans
            if plan.weights is not None
        ]
        contrast = self._factors(pair, (-1.0, 1.0)) if pair else None
        if not rows and not contrast:
            return {}
        newest = self._window.snapshots.index(plans[0].snapshots[-1]) if plans else -1
        return merge_arenas(self._arenas(), rows, contrast, newest)

    def completed(self, plan: Plan) -> Merge:
        """Makes what no pass over all tensors can, and checks the merge."""
        method, snapshots, copied, out = plan.method, plan.snapshots, plan.copied, plan.out
        if plan.weights is None:
            chains = [self._arenas(snapshot) for snapshot in snapshots]
            apart = copied.union(*self._pairs)  # the factors are overwritten
            merge_tensors(method, chains, out, apart, trajectory_of(snapshots), self._sharding)
        products = self._products(method, snapshots, copied)
        for name, part in products.items():
            out.flat(name).copy_(part)
        recomputed = self._recompute(out, copied, plan.excluded)
        self._check_finite(out, snapshots)
        return Merge(
            out,
            method,
            snapshots,
            plan.weights,
            sorted(copied.difference(recomputed)),
            lora_products=len(products) // 2,
            recomputed=recomputed,
            name=plan.name,
        )

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
            own = self._sharding.own(model.tensors)
            snapshots[-1].arena.check(own)
            weights = method.weights_along(trajectory_of(snapshots))
            return own, weights, self.copied(model, snapshots)

        own, weights, copied = self._ranks.agreed(prepare)
        products = self._ranks.agreed(partial(self._products, method, snapshots, copied))
        arenas = self._arenas(snapshots[-1])
        factors = self._factors(snapshots, weights)[: len(arenas)]
        try:
            merge_into_all(self._ranks, factors, arenas, own, copied, products)
            self._sharding.spread(model.tensors)
        except Exception as error:
            raise HalfRestoredError(f"the live weights are overwritten in part only: {error!r}") from error
        return weights

    def _products(
        self, method: MergeMethod, snapshots: Sequence[Snapshot], copied: Collection[str]
    ) -> dict[str, Tensor]:
        """This rank's parts of LoRA's factors, merged by their products, but those that are copied."""
        pairs = [pair for pair in self._pairs if not {*pair} & {*copied}]
        given = [partial(flat_tensors, self._arenas(snapshot)) for snapshot in snapshots]
        return merge_factors(pairs, given, method, trajectory_of(snapshots), self._sharding)

    def _recompute(self, merged: Arena, copied: Collection[str], excluded: Collection[str]) -> list[str]:
        """Finds spectral norm's vectors for the merged weights; on several ranks, none has a whole weight."""
        if self._ranks.size > 1:
            return []
        vectors = [
            names
            for name, names in self.vectors.items()
            if name not in excluded and names[0] not in copied and name not in merged.shared
        ]
        return recompute(vectors, merged.tensor)

    def _out(self, out: Arena | None, newest: Arena, copied: Collection[str]) -> Arena:
        """Room for a merge. What the newest snapshot gives, out of what it has in common, stays there."""
        shared = newest.shared.intersection(copied)
        if out is None or out.shared != shared:
            whole = self._window.store.layout
            layout = whole.only(whole.names - shared) if shared else whole
            out = Arena.empty(layout.native, newest.buffer.device)
        return out.reused().sharing(newest.frozen, shared)

    def _check_finite(self, merged: Arena, snapshots: Sequence[Snapshot]) -> None:
        # A map shows what its file holds by now, and anybody may write to that.
        try:
            self._window.store.check_finite(merged)
            if merged.frozen is not None:
                self._window.store.check_finite(merged.frozen.arena)
        except NonFiniteSnapshotError as error:
            steps = ", ".join(str(snapshot.step) for snapshot in snapshots)
            raise NonFiniteMergeError(f"in the merge of the snapshots of steps {steps} {error}") from None

    def _arenas(self, last: Snapshot | None = None) -> list[Arena]:
        """Those of the window's snapshots from the oldest on, up to ``last``: it may build on all of them."""
        snapshots = self._window.snapshots
        return [s.arena for s in snapshots[: snapshots.index(last) + 1 if last else None]]

    def _factors(self, snapshots: Sequence[Snapshot], factors: Sequence[float]) -> list[float]:
        """One factor for each of the window's snapshots: 0 for those that none was given for."""
        steps = [snapshot.step for snapshot in self._window.snapshots]
        every = [0.0] * len(steps)
        for snapshot, factor in zip(snapshots, factors, strict=True):
            every[steps.index(snapshot.step)] = factor
        return every
