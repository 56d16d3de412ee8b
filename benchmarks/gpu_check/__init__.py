"""Checks the project on one NVIDIA GPU."""
