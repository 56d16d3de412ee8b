"""How different the snapshots of a run are: what tells whether merging still pays."""

from merge_callback.diversity.rms import RMSDiversity, rms_diversity, rms_per_tensor, squared_distances

__all__ = ["RMSDiversity", "rms_diversity", "rms_per_tensor", "squared_distances"]
