"""The callback for Lightning."""
