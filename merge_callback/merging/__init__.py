"""The merging methods, their registry, and merging of whole models."""

from merge_callback.merging.linear import Ema, Extrapolate, Sma, Weighted, Wma, Wsm
from merge_callback.merging.merge import check_alike, merge_state_dicts
from merge_callback.merging.method import (
    METHODS,
    Inputs,
    LinearMethod,
    MergeMethod,
    Shard,
    Trajectory,
    register_method,
    resolve_method,
)
from merge_callback.merging.slerp import Slerp
from merge_callback.merging.sparse import Dare, Ties
from merge_callback.merging.task_vectors import TaskArithmetic
from merge_callback.merging.variability import Dropout, Meta, Noise

__all__ = [
    "METHODS",
    "Dare",
    "Dropout",
    "Ema",
    "Extrapolate",
    "Inputs",
    "LinearMethod",
    "MergeMethod",
    "Meta",
    "Noise",
    "Shard",
    "Slerp",
    "Sma",
    "TaskArithmetic",
    "Ties",
    "Trajectory",
    "Weighted",
    "Wma",
    "Wsm",
    "check_alike",
    "merge_state_dicts",
    "register_method",
    "resolve_method",
]
