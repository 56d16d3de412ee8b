"""What a merge becomes on disk: safetensors, a record of how it came about, a loadable folder."""

from merge_callback.publish.emission import Publisher

__all__ = ["Publisher"]
