"""Merging of checkpoint files."""
