"""What is logged and recorded of one snapshot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from merge_callback.analysis.layer_groups import layer_groups
from merge_callback.diversity.functional import Features
from merge_callback.metrics import DIVERSITY, DIVERSITY_CHANGE, DIVERSITY_RMS, LR_RATIO, PHASE, TOKENS, WINDOW
from merge_callback.signals.lr_phase import Phase
from merge_callback.snapshots.running import Stored
from merge_callback.snapshots.snapshot import Snapshot


@dataclass
class SnapshotReport:
    """What is logged about a snapshot, and at which step; ``stall`` are the seconds that training waited."""

    logged_step: int
    phase: Phase
    snapshot: Snapshot
    stall: float = 0.0
    window: Sequence[int] = ()
    segment: list[Snapshot] = field(default_factory=list)
    diversity: dict[str, Any] | None = None
    features: Features | None = None
    averages: Sequence[Stored] = ()
    functional: dict[str, float] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics for the loggers, by name."""
        found: dict[str, float] = {
            PHASE: self.phase.code,
            LR_RATIO: self.snapshot.lr_ratio,
            WINDOW: len(self.window),
        }
        if self.snapshot.tokens is not None:
            found[TOKENS] = self.snapshot.tokens
        if self.diversity is not None:
            found[DIVERSITY_RMS] = self.diversity["rms"]
            found[DIVERSITY_CHANGE] = self.diversity["change_percent"]
        return found | {f"{DIVERSITY}{name}": value for name, value in self.functional.items()}

    @property
    def record(self) -> dict[str, Any]:
        """What the event file keeps of it."""
        return {
            "tokens": self.snapshot.tokens,
            "lr": self.snapshot.lr,
            "phase": self.snapshot.phase,
            "stall": self.stall,
            "window": list(self.window),
            "diversity": self.diversity and self.diversity["rms"],
        }


class LayerDiversity:
    """The mean RMS distance of each layer's tensors."""

    def __init__(self) -> None:
        self._layers: dict[str, list[str]] = {}  # the names of the measured tensors, by layer

    def of(self, rms_by_tensor: Mapping[str, float]) -> dict[str, float]:
        """By layer; the layers are found again only if other tensors were measured."""
        if rms_by_tensor.keys() != {name for names in self._layers.values() for name in names}:
            self._layers = layer_groups(rms_by_tensor)
        return {layer: fmean(rms_by_tensor[name] for name in names) for layer, names in self._layers.items()}
