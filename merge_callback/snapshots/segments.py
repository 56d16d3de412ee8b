"""Snapshots in their order, and which of them may be merged: those of one segment of the learning rate."""

from __future__ import annotations

from collections.abc import Iterator

from merge_callback.snapshots.snapshot import Snapshot


class Segments:
    """Snapshots, oldest first.

    Args:
        size: how many are merged at most.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.snapshots: list[Snapshot] = []

    def __len__(self) -> int:
        return len(self.snapshots)

    def relabel(self, phase: str, since: int) -> None:
        """Puts the snapshots taken after step ``since`` into this segment: a change shows only later."""
        for snapshot in self.snapshots:
            if snapshot.lr_step > since:
                snapshot.phase, snapshot.since = phase, since

    def segment(self) -> list[Snapshot]:
        """The snapshots to merge: the newest two or more of one segment, none of the warm-up or a spike.

        The first snapshot of a decay has nothing to be merged with; until the second one comes, the merge
        is the last one of the stable phase.
        """
        for snapshots in self._segments():
            if len(snapshots) > 1 and snapshots[0].phase != "warmup":
                return snapshots[-self.size :]  # there may be one more, which could not go yet
        return []

    def before_spike(self, last_step: int) -> list[Snapshot]:
        """The snapshots up to ``last_step`` fit to restore: of one segment, oldest first.

        None that was taken while the loss was an outlier. Those of the warm-up come last. There the weights
        move too far for a mean unless the rate is held: so only those at the rate of the newest.
        """
        segments = list(self._segments(last_step))
        settled = next((snapshots for snapshots in segments if snapshots[0].phase != "warmup"), [])
        if settled or not segments:
            return settled
        return [snapshot for snapshot in segments[0] if snapshot.lr == segments[0][-1].lr]

    def mark_in_spike(self, before: int, step: int) -> bool:
        """Notes that the loss of an optimizer step was an outlier; says whether a snapshot was taken there.

        That loss is of the weights before the step, so it tells against the snapshot taken then, too.

        Args:
            before: the count of optimizer steps before it.
            step: the count after it.
        """
        marked = [s for s in self.snapshots if before <= s.step <= step and not s.in_spike]
        for snapshot in marked:
            snapshot.in_spike = True
        return bool(marked)

    def clear_in_spike(self, onset: int) -> None:
        """Takes back what was noted from step ``onset`` on: it was no spike, the data changed."""
        for snapshot in self.snapshots:
            snapshot.in_spike &= snapshot.step < onset - 1

    def pair(self, lag: int) -> tuple[Snapshot, Snapshot] | None:
        """The newest snapshot and the one ``lag`` before it, if both come after the warm-up."""
        if len(self.snapshots) <= lag or self.snapshots[-1 - lag].phase == "warmup":
            return None
        return self.snapshots[-1 - lag], self.snapshots[-1]

    def _segments(self, last_step: float = float("inf")) -> Iterator[list[Snapshot]]:
        """The clean snapshots up to ``last_step`` by segment, the newest segment first, each oldest first."""
        group: list[Snapshot] = []
        for snapshot in reversed(self.snapshots):
            if snapshot.step > last_step or snapshot.in_spike:
                continue
            if group and (snapshot.phase, snapshot.since) != (group[0].phase, group[0].since):
                yield group[::-1]
                group = []
            group.append(snapshot)
        if group:
            yield group[::-1]
