"""Copies of the live weights: all that training waits for when a snapshot is taken."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_callback.sharding.sharding import Sharding
from merge_callback.snapshots.arena import Arena, FrozenPart
from merge_callback.snapshots.arena_pool import ArenaPool
from merge_callback.snapshots.codecs import Whole
from merge_callback.snapshots.frozen import drop_moved, note_fingerprints
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.snapshot import NonFiniteSnapshotError
from merge_callback.snapshots.staging import has_room

_WORTH_A_FILE = 1 / 32
"""How much of a model has to be frozen for it to be kept once: else each snapshot stands by itself."""


@dataclass
class Captured:
    """What this rank has copied of the live weights, or why it has not."""

    arena: Arena | None = None
    error: Exception | None = None

    def get(self) -> Arena:
        """The copy.

        Raises:
            Exception: the reason if there is none.
        """
        if self.arena is None:
            raise self.error or ValueError("nothing was captured")
        return self.arena


class FiniteCheck:
    """Whether values are fit to be merged, apart from buffers that are meant to hold an Inf.

    Args:
        masks: names of buffers that may hold Inf.
        buffers: names of those that may hold -Inf: attention masks, which the first forward pass may fill.
    """

    def __init__(self, masks: Collection[str] = (), buffers: Collection[str] = ()) -> None:
        self.masks, self.buffers = masks, buffers

    def __call__(self, arena: Arena) -> None:
        """Makes sure that an arena is fit to be merged.

        Raises:
            NonFiniteSnapshotError: if a tensor holds NaN or Inf.
        """
        found = arena.non_finite()
        if found and (bad := [name for name in found if not self.may_hold(name, arena.tensor(name))]):
            raise NonFiniteSnapshotError(
                f"{', '.join(bad[:5])}{' …' if len(bad) > 5 else ''} hold NaN or Inf"
            )

    def may_hold(self, name: str, tensor: Tensor) -> bool:
        """Whether the NaN or Inf in a tensor are meant: a mask's."""
        if name in self.masks:
            return True
        return name in self.buffers and bool((tensor.isfinite() | (tensor == -torch.inf)).all())


class LiveCopy:
    """Copies what this rank keeps of the live weights into arenas; what is frozen it copies once.

    Of a model on a GPU the copy is made on that GPU, in the order of its stream, so that only the device
    waits. If the most that training has taken leaves no room for it, it goes to host memory, at the pace of
    the bus, and training waits. The first copy decides. What is frozen is only compared from then on.

    Args:
        layout: of what this rank keeps.
        whole: of the whole model.
        codec: of the window.
        pool: of arenas.
        devices: that of the live model, and that of the window.
        sharding: which part of each tensor this rank keeps.
    """

    def __init__(
        self,
        layout: Layout,
        whole: Layout,
        codec: Whole,
        pool: ArenaPool,
        devices: tuple[torch.device, torch.device],
        sharding: Sharding,
    ) -> None:
        self._layout, self._whole, self._codec, self._pool = layout, whole, codec, pool
        self._sharding = sharding
        self._live_device, self._device = devices
        self.moved: set[str] = set()  # what was frozen, and changed all the same
        self._judged = frozenset[str](), frozenset[str]()
        self._has_room: bool | None = None  # on the device of the live model; None before the first copy

    @torch.no_grad()
    def take(
        self, tensors: Mapping[str, Tensor], frozen: Collection[str], step: int, part: FrozenPart | None
    ) -> Arena:
        """A copy of ``tensors``.

        Args:
            tensors: the live ones.
            frozen: names of those that take no gradient now.
            step: of the snapshot.
            part: what the snapshots before it have in common, if they do.

        Raises:
            ValueError: if the model's tensors have changed.
        """
        own = self._sharding.own(tensors)
        if part is not None:
            self.moved |= drop_moved(part, own)
        elif names := self.worth_keeping_once(frozen):
            part = FrozenPart(step, self._copy(self._layout.only(names), own), names)
            note_fingerprints(part, own)
        names = part.names if part else frozenset()
        layout = self._layout.without(names)
        self._pool.serve(layout)
        return self._copy(layout, own).sharing(part, names)

    def worth_keeping_once(self, frozen: Collection[str]) -> frozenset[str]:
        """What is frozen, if that is a good part of the model; without what is stored in another dtype."""
        asked = frozenset(frozen) - self.moved
        if asked != self._judged[0]:  # at every snapshot, while training waits
            as_they_are = [
                g for g in self._codec.packed(self._whole).groups if g.stored == g.dtype and not g.is_delta
            ]
            names = asked.intersection(s.name for group in as_they_are for s in group.segments)
            is_worth_it = self._whole.only(names).nbytes > _WORTH_A_FILE * self._whole.nbytes
            self._judged = asked, names if is_worth_it else frozenset()
        return self._judged[1]

    def sharing_only(self, arena: Arena, names: frozenset[str]) -> Arena:
        """A copy with fewer tensors in common with others, which it then holds itself."""
        if names == arena.shared:
            return arena
        other = self._pool.acquire(self._layout.without(names), arena.buffer.device)
        other.copy_from(arena.tensors())
        self._pool.recycle(arena)
        if arena.frozen is not None:
            arena.frozen.names = names
        return other.sharing(arena.frozen, names)

    def spare(self, layout: Layout) -> AbstractContextManager[Arena]:
        """Room for one more copy of live tensors, for a while.

        It is what lies idle between two snapshots on the live model's device, or new memory of the window's.
        """
        return self._pool.lent(layout, self._live_device, self._device)

    def _copy(self, layout: Layout, own: Mapping[str, Tensor]) -> Arena:
        arena = self._acquire(layout)
        try:
            arena.copy_from(own)
        except ValueError:
            self._pool.recycle(arena)
            raise
        return arena

    def _acquire(self, layout: Layout) -> Arena:
        """An arena on the device of the live model, if it has the room, else on the window's."""
        if self._device == self._live_device:
            return self._pool.acquire(layout, self._device)
        if self._has_room is None:
            self._has_room = has_room(self._live_device, self._layout.nbytes)
        if self._has_room:
            try:
                return self._pool.acquire(layout, self._live_device)
            except torch.OutOfMemoryError:  # a failure frees the allocator's cache: it is not to come again
                self._has_room = False
        return self._pool.acquire(layout, self._device)
