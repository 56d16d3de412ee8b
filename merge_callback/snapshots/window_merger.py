"""Merging a window: which snapshots, by which methods, and how far apart they lie."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from merge_callback.diversity import rms_per_tensor
from merge_callback.merging import LinearMethod, MergeMethod
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.merge import Merge
from merge_callback.snapshots.merge_pass import MergePass, Plan, Room
from merge_callback.snapshots.snapshot import Snapshot
from merge_callback.snapshots.storage import DeviceMemory
from merge_callback.snapshots.window import Window

log = logging.getLogger(__name__)

_T = TypeVar("_T")


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
        self.window, self.methods, self.lag = window, methods, diversity_lag
        self.sharding, self.ranks = window.store.sharding, window.ranks
        self._pass = MergePass(window, exclude, lora)
        self.first_rms: float | None = None  # what the diversity is compared with
        self.diversity: dict[str, Any] | None = None
        self.rms_by_tensor: dict[str, float] = {}  # that it is the mean of, until the next measurement
        self._merge: Merge | None = None
        self._others: dict[str, Merge] = {}  # the candidates', as far as they are made
        self._own, self._rooms = Room(), defaultdict[str, Room](Room)
        self._has_room: bool | None = None  # for all candidates at once

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
        ends = [self.window.snapshots[0], self.window.snapshots[-1]]
        return self._pass.copied(model, ends) - self._pass.vectors.keys()

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
        """Overwrites the live model with the merge of ``snapshots``; see ``MergePass.merge_into``."""
        return self._pass.merge_into(model, snapshots, method)

    def _measured(
        self, model: ModelTensors, pair: tuple[Snapshot, Snapshot] | None, merge: bool
    ) -> dict[str, float] | None:
        """Merges if asked; returns the squared distances of ``pair``, of what trains, by tensor."""
        squares = self._merged(model, pair) if merge else None
        if pair is None:
            return None
        if squares is None:
            squares = self._pass.reduce([], pair)
        made = self._merge
        if made is not None and (made.snapshots[0], made.snapshots[-1]) == pair:
            ignored = model.buffers.union(made.copied)
        else:
            ignored = self._pass.copied(model, pair) | model.buffers
        return {n: squares[n] for n in self._pass.numel if n in squares and n not in ignored}

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
    ) -> Plan | None:
        """What is to be made, and room for it; of the default method without a ``name``.

        Args:
            model: the live model's tensors.
            segment: the snapshots that may be merged.
            name: of the candidate.
            known: what is copied, by the number of snapshots; what is found out here is added.
        """

        def plan() -> Plan:
            method = self._candidates[name] if name else self.methods[segment[-1].phase]
            snapshots = [*method.select(segment)]
            if (copied := known.get(len(snapshots))) is None:  # all ranks have a say in it
                copied = known[len(snapshots)] = self._pass.copied(model, snapshots)
            room = self._rooms[name if self._has_room else ""] if name else self._own
            if room.made is not None:
                room.made.wait()
                self._others.pop(room.made.name, None)
            return self._pass.plan(model, name or method.label, method, snapshots, copied, room)

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

    def _make(self, plans: Sequence[Plan], pair: tuple[Snapshot, Snapshot] | None) -> dict[str, float]:
        """Makes merges, the linear ones in one pass, and returns the squared distances of ``pair``."""
        squares = self._pass.reduce(plans, pair)
        for plan in plans:
            if plan.room is self._own:
                self._merge = plan.room.made = self._pass.completed(plan)
            elif merge := self._attempt(plan.name, partial(self._pass.completed, plan)):
                self._others[plan.name] = plan.room.made = merge
        return squares

    def _record_diversity(
        self, names: Sequence[str], squares: Tensor, pair: tuple[Snapshot, Snapshot]
    ) -> None:
        numel = torch.tensor([self._pass.numel[name] for name in names], dtype=torch.int64)
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
