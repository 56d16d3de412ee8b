"""A snapshot: the weights at one optimizer step, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from merge_callback.snapshots.arena import Arena, FrozenPart


class NonFiniteSnapshotError(ValueError):
    """A snapshot that holds NaN or Inf; the message names the tensors."""


class DeltaOverflowError(NonFiniteSnapshotError):
    """A snapshot whose difference to the one before can't be stored; the message names the tensors."""


@dataclass
class Snapshot:
    """The weights at one optimizer step.

    ``phase`` and ``since`` name the segment of the learning-rate schedule it was taken in; only snapshots of
    one segment may be merged. ``since`` and ``lr_step`` count the steps whose learning rate was read: before
    the segment, and up to the snapshot. ``in_spike`` tells that the loss was an outlier around that step.
    ``file`` (in the window's folder) and ``checksum`` (SHA-256 of the file) are empty for a snapshot that
    lives in memory only; that of several ranks is a folder with a file of each, and a list of them.
    ``difference_to`` is the step of the snapshot before, if this one is kept as the difference to it.
    ``frozen`` is the file (or folder) of what it has in common with others, if that is kept once, and
    ``frozen_checksum`` that one's checksum.
    """

    kind: ClassVar[str] = ""

    step: int
    tokens: int | None
    lr: float
    lr_ratio: float
    phase: str
    since: int
    lr_step: int
    in_spike: bool = False
    file: str = ""
    checksum: str = ""
    difference_to: int | None = None
    frozen: str = ""
    frozen_checksum: str = ""
    arena: Arena = field(default=None, repr=False, compare=False)  # type: ignore[assignment]

    def record(self) -> dict[str, Any]:
        """Everything except the weights, as primitives."""
        record = {**vars(self)}
        del record["arena"]
        if not self.frozen:
            del record["frozen"], record["frozen_checksum"]
        return record


Stored = Snapshot | FrozenPart
"""What a window keeps in a file of its own."""
