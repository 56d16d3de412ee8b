"""Measures how different the snapshots of a run are, which shows whether merging still pays."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from merge_callback.diversity.distance import rms_per_tensor, squared_distances

if TYPE_CHECKING:
    from merge_callback.diversity.rms import RMSDiversity, rms_diversity

__all__ = ["RMSDiversity", "rms_diversity", "rms_per_tensor", "squared_distances"]


def __getattr__(name: str) -> Any:
    # Imported on first use: torchmetrics takes as long to import as torch, and most uses don't need it.
    if name in ("RMSDiversity", "rms_diversity"):
        return getattr(import_module("merge_callback.diversity.rms"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
