"""Merging within a Hugging Face ``Trainer``."""
