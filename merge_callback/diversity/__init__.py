"""How different the snapshots of a run are: what tells whether merging still pays."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from merge_callback.diversity.distance import rms_per_tensor, squared_distances

if TYPE_CHECKING:
    from merge_callback.diversity.rms import RMSDiversity, rms_diversity

__all__ = ["RMSDiversity", "rms_diversity", "rms_per_tensor", "squared_distances"]


def __getattr__(name: str) -> Any:
    # Imported on first use: torchmetrics, which the measures of files do not need, takes as long as torch.
    if name in ("RMSDiversity", "rms_diversity"):
        return getattr(import_module("merge_callback.diversity.rms"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
