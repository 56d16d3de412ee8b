"""Reads a training run: step statistics, tokens, learning-rate phase, spikes."""
