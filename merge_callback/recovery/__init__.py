"""The response to a loss spike: evidence, restore, record."""
