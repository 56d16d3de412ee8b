"""How a window codes its snapshots: each by itself, or as the difference to the one before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.arena_pool import ArenaPool
from merge_callback.snapshots.deltas import decode, encode
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.snapshot import DeltaOverflowError, NonFiniteSnapshotError, Snapshot

CODECS = {"delta-fp16": torch.float16, "delta-bf16": torch.bfloat16}
"""What differences are stored in, by the codec's name."""


class Whole:
    """Keeps every snapshot by itself."""

    name = ""

    def packed(self, layout: Layout) -> Layout:
        """The layout of a snapshot that builds on another."""
        return layout

    def base(self, before: Sequence[Snapshot]) -> Snapshot | None:
        """The snapshot that the next one builds on, if any; ``before`` is the window, oldest first."""
        return None

    def encoded(self, arena: Arena, before: Sequence[Snapshot], pool: ArenaPool) -> Arena:
        """A snapshot as it is kept after those ``before``; never called without a ``base``."""
        return arena


class Delta(Whole):
    """Keeps a snapshot as the difference to the one before, in 16 bits; see ``deltas``.

    Args:
        name: of ``CODECS``.
        in_files: whether the snapshots are kept in files, too: then only one that has its file is built on.
        check: raises ``NonFiniteSnapshotError`` for an arena that holds NaN or Inf.
    """

    def __init__(self, name: str, in_files: bool, check: Callable[[Arena], None]) -> None:
        self.name = name
        self._stored: torch.dtype = CODECS[name]
        self._in_files, self._check = in_files, check

    def packed(self, layout: Layout) -> Layout:
        """The layout of a snapshot that builds on another."""
        return layout.delta(self._stored)

    def base(self, before: Sequence[Snapshot]) -> Snapshot | None:
        """The snapshot that the next one builds on, if any; ``before`` is the window, oldest first."""
        return before[-1] if before and (before[-1].file or not self._in_files) else None

    def encoded(self, arena: Arena, before: Sequence[Snapshot], pool: ArenaPool) -> Arena:
        """A snapshot as the difference to the one before.

        Args:
            arena: of it, whole, and on the device of those before.
            before: the window's snapshots, of which the last can be relied on.
            pool: for the difference.

        Raises:
            DeltaOverflowError: if a weight has moved further than the difference can hold.
        """
        delta = pool.acquire(self.packed(arena.layout), arena.buffer.device)
        encode(arena, [snapshot.arena for snapshot in before], delta)
        try:
            self._check(delta)
        except NonFiniteSnapshotError as error:
            pool.recycle(delta)
            raise DeltaOverflowError(
                f"in the difference to that of step {before[-1].step} {error}: "
                f"it moved too far for snapshot_codec={self.name!r}"
            ) from None
        return delta.sharing(arena.frozen, arena.shared)


def decoded(snapshots: Sequence[Snapshot], layout: Layout, pool: ArenaPool) -> Arena:
    """The last of a window's snapshots as no difference.

    Args:
        snapshots: the window's from its oldest on.
        layout: of all that this rank keeps.
        pool: for what it returns.
    """
    last = snapshots[-1].arena
    whole = pool.acquire(layout.without(last.shared), last.buffer.device).sharing(last.frozen, last.shared)
    decode([snapshot.arena for snapshot in snapshots], whole)
    return whole
