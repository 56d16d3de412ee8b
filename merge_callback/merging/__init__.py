"""The merging methods, their registry, and merging of whole models."""

from merge_callback.merging.linear import Ema, Sma, Weighted, Wma, Wsm
from merge_callback.merging.merge import matches_any, merge_state_dicts
from merge_callback.merging.method import (
    METHODS,
    LinearMethod,
    MergeMethod,
    register_method,
    resolve_method,
)

__all__ = [
    "METHODS",
    "Ema",
    "LinearMethod",
    "MergeMethod",
    "Sma",
    "Weighted",
    "Wma",
    "Wsm",
    "matches_any",
    "merge_state_dicts",
    "register_method",
    "resolve_method",
]
