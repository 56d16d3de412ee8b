"""Merging the window: which snapshots, by which method, and the one pass over their arenas."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from merge_callback.diversity import rms_per_tensor
from merge_callback.merging import LinearMethod, MergeMethod, Trajectory
from merge_callback.merging.power_iteration import recompute, vectors_of
from merge_callback.merging.running import RunningAverage
from merge_callback.snapshots.arena import Arena, all_finite
from merge_callback.snapshots.arena_merge import Sum, in_common, merge_arenas, merge_tensors
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.deltas import flat_tensors
from merge_callback.snapshots.live_merge import HalfRestoredError, merge_into_all
from merge_callback.snapshots.lora_merge import merge_factors, product_pairs
from merge_callback.snapshots.snapshot import NonFiniteSnapshotError, Snapshot
from merge_callback.snapshots.storage import DeviceMemory
from merge_callback.snapshots.window import Window

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class NonFiniteMergeError(ValueError):
    """A merge that holds NaN or Inf, though its snapshots held none when they were taken."""


@dataclass
class Merge:
    """A merge of part of the window: its tensors in the model's dtypes, and how they came about.

    It owns its arena until it is published, if it is to be. Whoever hands it in for that sets ``published``,
    which waits for it. The next merge is written to the same memory. ``weights`` are the snapshots' if the
    method is linear, else ``None``. ``copied`` names what is the newest snapshot's, ``recomputed`` the
    singular vectors of spectral norm that were found again for the merged weights. ``lora_products`` counts
    the pairs of LoRA factors that were merged by their product. ``name`` is that of the candidate.
    """

    arena: Arena
    method: MergeMethod | RunningAverage
    snapshots: list[Snapshot]
    weights: list[float] | None
    copied: list[str]
    lora_products: int = 0
    published: Callable[[], object] | None = field(default=None, repr=False, compare=False)
    recomputed: list[str] = field(default_factory=list)
    name: str = ""

    def wait(self) -> None:
        """Waits until nobody reads the arena any more."""
        if self.published is not None:
            self.published()

    @cached_property
    def step(self) -> int:
        """The optimizer step of the newest snapshot in it."""
        return self.snapshots[-1].step


@dataclass
class _Room:
    """Memory of a merge, and the last one in it, which may still be published, though forgotten."""

    out: Arena | None = None
    made: Merge | None = None


@dataclass
class _Plan:
    """A merge that is to be made; ``weights`` are the snapshots' if the method is linear, else ``None``."""

    name: str
    method: MergeMethod
    snapshots: list[Snapshot]
    weights: list[float] | None
    copied: set[str]
    excluded: set[str]
    room: _Room
    out: Arena


class WindowMerger:
    """Merges a window and measures its diversity, both in one pass if both are wanted.

    It makes one merge by the method of the phase and, in the same pass, one by each of the candidates that is
    linear. If there is no room for an arena of each, candidates are made one by one as they are asked for.

    Args:
        window: the snapshots.
        methods: the method of each phase, by the phase's name.
        diversity_lag: how many snapshots apart the pair lies whose distance is measured.
        exclude: patterns of names that are copied, not averaged.
        lora: ``"delta"`` merges the factors of LoRA adapters by their product, ``"factors"`` each for itself.
        last: how many of the newest snapshots of a segment are merged at most; ``None`` for all.
        candidates: what else the window is merged by, by name.
        processes: that share this machine's memory.
    """

    def __init__(
        self,
        window: Window,
        methods: Mapping[str, MergeMethod],
        diversity_lag: int,
        exclude: Sequence[str] = (),
        lora: str = "delta",
        last: int | None = None,
        candidates: Mapping[str, MergeMethod] = MappingProxyType({}),
        processes: int = 1,
    ) -> None:
        self._last, self._candidates, self._processes = last, candidates, processes
        self.window, self.methods, self.lag, self.exclude = window, methods, diversity_lag, exclude
        self.sharding, self.ranks = window.store.sharding, window.ranks
        self.first_rms: float | None = None  # what the diversity is compared with
        self.diversity: dict[str, Any] | None = None
        self.rms_by_tensor: dict[str, float] = {}  # that it is the mean of, until the next measurement
        self._numel = {name: s.numel for name, (_, s) in window.store.whole.places.items()}
        self._vectors = vectors_of(self._numel)
        self._merge: Merge | None = None
        self._others: dict[str, Merge] = {}  # the candidates', as far as they are made
        self._own, self._rooms = _Room(), defaultdict[str, _Room](_Room)
        self._has_room: bool | None = None  # for all candidates at once
        self._pairs = product_pairs(self.sharding.wholes) if lora == "delta" else []

    def measure(self, model: ModelTensors, merge: bool) -> None:
        """Reads the window once after an append: the newest pair's diversity and, if asked, the merge.

        Each rank reads what it keeps; of the diversity one number per tensor is summed over all ranks.
        """
        self.forget()
        self.diversity, self.rms_by_tensor = None, {}
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
        """Drops the merges that were made: the window's snapshots turned out to be of another segment."""
        self._merge, self._others = None, {}

    def constant(self, model: ModelTensors) -> set[str]:
        """Names of what is frozen, a buffer or excluded, and the same in the oldest and newest snapshot.

        All ranks have to ask.
        """
        return (
            self._copied(model, [self.window.snapshots[0], self.window.snapshots[-1]]) - self._vectors.keys()
        )

    def current(self, model: ModelTensors) -> Merge | None:
        """The merge of the window as it is; ``None`` with fewer than two snapshots to merge."""
        if self._merge is None or self._is_spoilt(self._merge):
            self.forget()
            self._merged(model, None)
        return self._merge

    @property
    def names(self) -> list[str]:
        """Of the candidates; the one that is the method of the present phase is none of them."""
        return [name for name in self._candidates if name != self.default]

    @property
    def default(self) -> str:
        """The name of the merge by the method of the present phase; empty with nothing to merge."""
        snapshots = self._segment()
        return self.methods[snapshots[-1].phase].label if snapshots else ""

    def candidate(self, model: ModelTensors, name: str) -> Merge | None:
        """The merge by one of the candidates; ``None`` if there is none, or if it could not be made.

        If there is no room for all of them, it stays until another one is asked for.
        """
        if name not in self._others or self._is_spoilt(self._others[name]):
            segment = self._segment()
            plan = self._plan(model, segment, name, {}) if segment else None
            self._make([plan] if plan else [], None)
        return self._others.get(name)

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

    def _segment(self) -> list[Snapshot]:
        """The snapshots to merge, oldest first; none if there are fewer than two."""
        snapshots = self.window.segment()[-self._last if self._last else None :]
        return snapshots if len(snapshots) > 1 else []

    def _is_spoilt(self, merge: Merge) -> bool:
        """Whether the file of what a merge has in common with snapshots was spoilt."""
        return (part := merge.arena.frozen) is not None and part not in self.window.held()

    def _merged(self, model: ModelTensors, pair: tuple[Snapshot, Snapshot] | None) -> dict[str, float] | None:
        """Makes the merges, and returns the squared distances of ``pair``; ``None`` with nothing to merge."""
        if not (segment := self._segment()):
            return None
        known: dict[int, set[str]] = {}
        plans = [self._plan(model, segment, "", known)]
        if self._candidates and self._all_at_once(segment[-1].arena):
            plans += [self._plan(model, segment, name, known) for name in self.names]
        return self._make([plan for plan in plans if plan], pair)

    def _all_at_once(self, newest: Arena) -> bool:
        """Whether there is room for the merges of all candidates at once; found out once."""
        if self._has_room is None:
            device = newest.buffer.device
            needed = len(self._candidates) * self.window.store.layout.native.nbytes
            shared = 1 if device.type == "cuda" else self._processes
            is_roomy = 2 * shared * needed <= DeviceMemory.free_bytes(None, device)
            self._has_room = all(self.ranks.exchange(is_roomy))
        return self._has_room

    def _plan(
        self, model: ModelTensors, segment: Sequence[Snapshot], name: str, known: dict[int, set[str]]
    ) -> _Plan | None:
        """What is to be made, and room for it; of the default method without a ``name``.

        Args:
            model: the live model's tensors.
            segment: the snapshots that may be merged.
            name: of the candidate.
            known: what is copied, by the number of snapshots; what is found out here is added.
        """

        def plan() -> _Plan:
            method = self._candidates[name] if name else self.methods[segment[-1].phase]
            snapshots = [*method.select(segment)]
            if (copied := known.get(len(snapshots))) is None:  # all ranks have a say in it
                copied = known[len(snapshots)] = self._copied(model, snapshots)
            room = self._rooms[name if self._has_room else ""] if name else self._own
            if room.made is not None:
                room.made.wait()
                self._others.pop(room.made.name, None)
            weights = (
                method.weights_along(_trajectory(snapshots)) if isinstance(method, LinearMethod) else None
            )
            room.out = self._out(room.out, snapshots[-1].arena, copied)
            excluded = model.matching(self.exclude)
            return _Plan(name or method.label, method, snapshots, weights, copied, excluded, room, room.out)

        return self._attempt(name, plan) if name else plan()

    def _attempt(self, name: str, action: Callable[[], _T]) -> _T | None:
        """The result of an action for a candidate; ``None`` on all ranks if it fails on one.

        A candidate that fails is no reason to go without the other merges.
        """
        try:
            return self.ranks.agreed(action)
        except Exception as error:
            log.warning("merge: the candidate %s was left out: %s", name, error)
            return None

    def _make(self, plans: Sequence[_Plan], pair: tuple[Snapshot, Snapshot] | None) -> dict[str, float]:
        """Makes merges, the linear ones in one pass, and returns the squared distances of ``pair``."""
        rows = [
            Sum(self._factors(plan.snapshots, plan.weights), plan.out, plan.copied)
            for plan in plans
            if plan.weights is not None
        ]
        contrast = self._factors(pair, (-1.0, 1.0)) if pair else None
        squares: dict[str, float] = {}
        if rows or contrast:
            newest = self.window.snapshots.index(plans[0].snapshots[-1]) if plans else -1
            squares = merge_arenas(self._arenas(), rows, contrast, newest)
        for plan in plans:
            if plan.room is self._own:
                self._merge = plan.room.made = self._completed(plan)
            elif merge := self._attempt(plan.name, partial(self._completed, plan)):
                self._others[plan.name] = plan.room.made = merge
        return squares

    def _completed(self, plan: _Plan) -> Merge:
        """Makes what no pass over all tensors can, and checks the merge."""
        method, snapshots, copied, out = plan.method, plan.snapshots, plan.copied, plan.out
        if plan.weights is None:
            chains = [self._arenas(snapshot) for snapshot in snapshots]
            apart = copied.union(*self._pairs)  # the factors are overwritten
            merge_tensors(method, chains, out, apart, _trajectory(snapshots), self.sharding)
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

    def _out(self, out: Arena | None, newest: Arena, copied: Collection[str]) -> Arena:
        """Room for a merge. What the newest snapshot gives, out of what it has in common, stays there."""
        shared = newest.shared.intersection(copied)
        if out is None or out.shared != shared:
            whole = self.window.store.layout
            layout = whole.only(whole.names - shared) if shared else whole
            out = Arena.empty(layout.native, newest.buffer.device)
        return out.reused().sharing(newest.frozen, shared)

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
        return merge_arenas(self._arenas(), contrast=self._factors(pair, (-1.0, 1.0)))

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
