"""Merge checkpoints while the model trains."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from merge_callback.checkpoints.load_merge import load_merge
    from merge_callback.diversity import RMSDiversity
    from merge_callback.merging import METHODS, merge_state_dicts, register_method
    from merge_callback.merging.running import PowerEma, RunningEma, RunningWsm, SmaSince
    from merge_callback.offline.posthoc import posthoc_ema
    from merge_callback.recovery.spike_policy import TrainingDivergedError
    from merge_callback.spike_options import SpikeOptions
    from merge_callback.trainers.lightning.adaptive_decay import WarmupAdaptiveDecay
    from merge_callback.trainers.lightning.callback import CheckpointMergeCallback
    from merge_callback.trainers.loop import CheckpointMerger

__all__ = [
    "METHODS",
    "CheckpointMergeCallback",
    "CheckpointMerger",
    "PowerEma",
    "ProbeOptions",
    "RMSDiversity",
    "RunningEma",
    "RunningWsm",
    "SmaSince",
    "SpikeOptions",
    "TrainingDivergedError",
    "WarmupAdaptiveDecay",
    "load_merge",
    "merge_state_dicts",
    "posthoc_ema",
    "register_method",
]

_HOMES = {
    "CheckpointMergeCallback": "trainers.lightning.callback",
    "CheckpointMerger": "trainers.loop",
    "METHODS": "merging",
    "PowerEma": "merging.running",
    "ProbeOptions": "probe_options",
    "RMSDiversity": "diversity",
    "RunningEma": "merging.running",
    "RunningWsm": "merging.running",
    "SmaSince": "merging.running",
    "SpikeOptions": "spike_options",
    "TrainingDivergedError": "recovery.spike_policy",
    "WarmupAdaptiveDecay": "trainers.lightning.adaptive_decay",
    "load_merge": "checkpoints.load_merge",
    "merge_state_dicts": "merging",
    "posthoc_ema": "offline.posthoc",
    "register_method": "merging",
}


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("merge-callback")
        except PackageNotFoundError:  # a source tree on the path
            return "0+unknown"
    # Imported on first use: Lightning costs a second and 100 MB that merging files does not need.
    if name in _HOMES:
        return getattr(import_module(f"merge_callback.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
