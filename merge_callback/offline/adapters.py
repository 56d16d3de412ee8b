"""Whether adapters of other kinds than LoRA belong together: their configurations say what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge_callback.checkpoints.checkpoint import Checkpoint, read_json
from merge_callback.checkpoints.file_names import ADAPTER_CONFIG
from merge_callback.messages import warn

_BASE = "base_model_name_or_path"
_SAYS_NOTHING = {_BASE, "inference_mode", "revision", "auto_mapping", "peft_version", "task_type"}
"""Entries that do not change what the weights of an adapter do."""


def check_adapters(checkpoints: Sequence[Checkpoint]) -> None:
    """Makes sure that checkpoints which are adapters are of one kind. LoRA is merged by ``merge_adapters``.

    Args:
        checkpoints: oldest first.

    Raises:
        ValueError: if they are not: their rank, scale or layers differ.
    """
    newest = checkpoints[-1]
    configs = [_config(checkpoint) for checkpoint in checkpoints]
    if not any(configs):
        return
    for checkpoint, config in zip(checkpoints[:-1], configs, strict=False):
        told = [
            f"{key} is {config.get(key)!r} and {configs[-1].get(key)!r}"
            for key in sorted(config.keys() | configs[-1].keys())
            if key not in _SAYS_NOTHING and unordered(config.get(key)) != unordered(configs[-1].get(key))
        ]
        if told:
            raise ValueError(
                f"{checkpoint.path} and {newest.path} are adapters of other kinds: {'; '.join(told[:3])}; "
                "merge those of one run"
            )
    warn_of_bases(configs)


def warn_of_bases(configs: Sequence[Mapping[str, Any]]) -> None:
    """Warns of adapters that were trained on different base models."""
    if len(bases := {str(config.get(_BASE)) for config in configs}) > 1:
        warn(f"the adapters are of different base models: {', '.join(sorted(bases))}")


def _config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    taken = any(path.name == ADAPTER_CONFIG for path in checkpoint.extras)
    return read_json(checkpoint.path, ADAPTER_CONFIG) if taken else {}


def unordered(value: object) -> object:
    """A value in which order says nothing: peft saves its sets as lists."""
    return sorted(map(str, value)) if isinstance(value, list) else value
