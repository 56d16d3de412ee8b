"""A merge of a window's snapshots, and where these lie along the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from merge_callback.merging import MergeMethod, Trajectory
from merge_callback.merging.running import RunningAverage
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.snapshot import Snapshot


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


def trajectory_of(snapshots: Sequence[Snapshot]) -> Trajectory:
    """Their positions, and their steps."""
    return Trajectory(positions(snapshots), [snapshot.step for snapshot in snapshots])


def positions(snapshots: Sequence[Snapshot]) -> list[float]:
    """Where snapshots lie along the run: their tokens; their steps if tokens are not counted."""
    tokens = [float(s.tokens) for s in snapshots if s.tokens is not None]
    if len(tokens) == len(snapshots) and all(b > a for a, b in pairwise(tokens)):
        return tokens
    return [float(snapshot.step) for snapshot in snapshots]
