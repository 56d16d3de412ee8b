"""The one pass over flat memory under every linear merge and every weight-space distance."""

from merge_callback.reduce.blocks import accumulator_dtype
from merge_callback.reduce.dispatch import one_pass

__all__ = ["accumulator_dtype", "one_pass"]
