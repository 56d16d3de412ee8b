"""Readers of checkpoint files, one for each format."""
