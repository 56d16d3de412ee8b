"""Checks the project on one NVIDIA GPU, in less than eight minutes."""
