"""Memory of snapshots that are gone, for those to come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

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
        free = self._taken(lambda free: free.layout is layout and free.buffer.device == device)
        return free.reused() if free is not None else Arena.empty(layout, device)

    @contextmanager
    def lent(self, layout: Layout, device: torch.device, otherwise: torch.device) -> Iterator[Arena]:
        """An arena of any layout for a while: in memory that lies idle on one device, or new on another."""
        idle = self._taken(lambda free: free.buffer.device == device and free.layout.nbytes >= layout.nbytes)
        try:
            if idle is None:
                yield Arena.empty(layout, otherwise)
            else:
                with torch.inference_mode(False):
                    arena = Arena(layout, idle.buffer[: layout.nbytes])
                yield arena
        finally:
            if idle is not None:
                self.recycle(idle)

    def _taken(self, fits: Callable[[Arena], bool]) -> Arena | None:
        for free in reversed(self._free[:]):
            if fits(free):
                with suppress(ValueError):  # another thread was faster
                    self._free.remove(free)
                    return free
        return None

    def recycle(self, arena: Arena) -> None:
        """Takes back an arena that nobody uses any more."""
        if arena.layout is self._layout or arena.layout is self._packed(self._layout):
            self._free.append(arena)
