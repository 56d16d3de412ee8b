"""Measures of checkpoint files: pairwise diversity, interference, plots and tables."""
