"""What is done about a loss spike: evidence, restore, record."""
