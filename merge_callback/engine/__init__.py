"""The merging of one training run, for any training loop."""
