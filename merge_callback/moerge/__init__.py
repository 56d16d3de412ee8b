"""MoErging: one model of several LoRA experts, each token routed to k of them."""

from merge_callback.moerge.layer import MoergedLinear, arrow
from merge_callback.moerge.model import load_moerged, moerge, save_moerged

__all__ = ["MoergedLinear", "arrow", "load_moerged", "moerge", "save_moerged"]
