"""Memory of snapshots that are gone, for those to come."""

from __future__ import annotations

from collections.abc import Callable

import torch

from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.layout import Layout


class ArenaPool:
    """Arenas of the layouts that snapshots have now; those of other layouts are freed.

    Args:
        layout: of a snapshot.
        packed: gives the layout that the codec keeps such a snapshot in.
    """

    def __init__(self, layout: Layout, packed: Callable[[Layout], Layout]) -> None:
        self._layout, self._packed = layout, packed
        self._free: list[Arena] = []

    def serve(self, layout: Layout) -> None:
        """Notes the layout of the snapshots to come."""
        if layout is not self._layout:
            self._layout, self._free = layout, []

    def acquire(self, layout: Layout, device: torch.device) -> Arena:
        """An uninitialised arena, recycled if one is free."""
        for index in reversed(range(len(self._free))):
            free = self._free[index]
            if free.layout is layout and free.buffer.device == device:
                return self._free.pop(index).reused()
        return Arena.empty(layout, device)

    def recycle(self, arena: Arena) -> None:
        """Takes back an arena that nobody uses any more."""
        if arena.layout is self._layout or arena.layout is self._packed(self._layout):
            self._free.append(arena)
