"""Small, real, healthy training tasks whose losses are hard to tell from a divergence."""
