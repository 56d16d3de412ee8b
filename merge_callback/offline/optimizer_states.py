"""The optimizer states of Lightning checkpoints, merged like the weights, for training to go on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.checkpoints.pytorch_file import load_mapped
from merge_callback.checkpoints.spool import map_tensors
from merge_callback.checkpoints.stand_ins import holds_stand_in, without_stand_ins
from merge_callback.merging import LinearMethod
from merge_callback.messages import warn
from merge_callback.offline.file_merge import FileMerge
from merge_callback.reduce import one_pass
from merge_callback.snapshots.arena import all_finite

_STATES = "optimizer_states"
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""What is merged of an optimizer's state; ``step`` is the newest checkpoint's."""


def weights_of_moments(merge: FileMerge) -> list[float]:
    """What multiplies the moments of each checkpoint: what multiplies its weights.

    Raises:
        ValueError: if the merge is no weighted sum, or has a negative weight, which would make a mean of
            squares negative.
    """
    method = merge.job.method
    if not isinstance(method, LinearMethod) or merge.base is not None:
        raise ValueError(f"--optimizer-state: {method.name!r} is no weighted sum of the checkpoints")
    weights = method.weights_along(merge.trajectory)
    if min(weights) < 0:
        raise ValueError(
            f"--optimizer-state: {method.name!r} has negative weights, and the second moments (exp_avg_sq) "
            "would become negative with them"
        )
    return weights


def resumable(merge: FileMerge, spool: Path) -> dict[str, Any]:
    """All that the newest Lightning checkpoint holds besides the model's weights, its moments merged.

    Args:
        merge: of Lightning checkpoints, ``.ckpt`` files.
        spool: a folder on a disk with room for the moments.

    Raises:
        ValueError: if a checkpoint has no optimizer state, or another than the newest; the entry is named.
        OSError: if the spool has no room.
    """
    newest, found = comparable(merge)
    if lost := sorted(str(key) for key in newest if key != "state_dict" and holds_stand_in(newest[key])):
        warn(
            f"{merge.newest.path}: objects of other classes than Python's and torch's are left out of the "
            f"merge, under {', '.join(lost)}"
        )
    kept = without_stand_ins({key: value for key, value in newest.items() if key != "state_dict"})
    return {**kept, _STATES: _replaced(newest[_STATES], _merged(merge, found, spool))}


def comparable(merge: FileMerge) -> tuple[Mapping[Any, Any], list[dict[Any, Tensor]]]:
    """The content of the newest Lightning checkpoint, and what is merged of each one's optimizer states.

    Raises:
        ValueError: as `resumable`, apart from values that are not finite.
    """
    weights_of_moments(merge)
    contents = [_content(checkpoint) for checkpoint in merge.checkpoints]
    found = [dict(_moments(content[_STATES])) for content in contents]
    for checkpoint, moments in zip(merge.checkpoints, found, strict=True):
        _check_same(checkpoint, moments, found[-1], merge.newest)
    return contents[-1], found


def _content(checkpoint: Checkpoint) -> Mapping[Any, Any]:
    content = load_mapped(checkpoint.path) if checkpoint.format == "lightning" else {}
    states = content.get(_STATES)
    if not isinstance(states, list) or not states:
        raise ValueError(
            f"--optimizer-state: {checkpoint.path} is no Lightning checkpoint with the state of an optimizer"
        )
    return content


def _moments(states: Sequence[Any]) -> Iterator[tuple[tuple[int, Any, str], Tensor]]:
    """The tensors that are merged, by the optimizer's place, the parameter and the name.

    Raises:
        ValueError: for state of another kind.
    """
    for place, state in enumerate(states):
        if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
            raise ValueError(
                f"--optimizer-state: optimizer {place} has no state by parameter, as torch's have"
            )
        for parameter, entries in state["state"].items():
            for name, value in entries.items() if isinstance(entries, Mapping) else [("", entries)]:
                if name in MOMENTS and isinstance(value, Tensor) and value.is_floating_point():
                    yield (place, parameter, name), value
                elif value is not None and (name != "step" or not _is_number(value)):
                    raise ValueError(
                        f"--optimizer-state: parameter {parameter!r} of optimizer {place} has {name!r}, "
                        f"expected {', '.join(MOMENTS)} and step: only such moments have a mean"
                    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _check_same(
    checkpoint: Checkpoint, moments: Mapping[Any, Tensor], newest: Mapping[Any, Tensor], other: Checkpoint
) -> None:
    for key in {*moments} ^ {*newest}:
        raise ValueError(
            f"--optimizer-state: only one of {checkpoint.path} and {other.path} has {key[2]!r} of parameter "
            f"{key[1]!r} in optimizer {key[0]}"
        )
    for key, tensor in moments.items():
        if tensor.shape != newest[key].shape:
            raise ValueError(
                f"--optimizer-state: {key[2]!r} of parameter {key[1]!r} is {tuple(tensor.shape)} in "
                f"{checkpoint.path} and {tuple(newest[key].shape)} in {other.path}"
            )


@torch.no_grad()
def _merged(merge: FileMerge, found: Sequence[Mapping[Any, Tensor]], spool: Path) -> dict[Any, Tensor]:
    """The weighted sums, in a nameless file for each dtype: see ``split_dtypes``."""
    merged: dict[Any, Tensor] = {}
    weights = weights_of_moments(merge)
    for dtype in {tensor.dtype for tensor in found[-1].values()}:
        keys = {str(i): key for i, key in enumerate(found[-1]) if found[-1][key].dtype == dtype}
        room = map_tensors(spool, {i: (dtype, found[-1][key].shape) for i, key in keys.items()})
        for i, key in keys.items():
            for checkpoint, moments in zip(merge.checkpoints, found, strict=True):
                if not all_finite(moments[key]):
                    raise ValueError(
                        f"--optimizer-state: {key[2]!r} of parameter {key[1]!r} holds NaN or Inf in "
                        f"{checkpoint.path}"
                    )
            one_pass([moments[key].reshape(-1) for moments in found], weights, room[i].reshape(-1))
            merged[key] = room[i]
    return merged


def _replaced(states: Sequence[Any], merged: Mapping[Any, Tensor]) -> list[dict[str, Any]]:
    return [
        {
            **state,
            "state": {
                parameter: {
                    name: merged.get((place, parameter, name), value) for name, value in entries.items()
                }
                for parameter, entries in state["state"].items()
            },
        }
        for place, state in enumerate(states)
    ]
