"""A model's tensors over all ranks, and how they differ from an earlier state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from merge_callback.checks import matches_any
from merge_callback.sharding import Sharding, local
from merge_callback.snapshots.capture import ModelTensors, clean_name
from merge_callback.snapshots.unfit import LOADING

Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


def own_gradient(names: Mapping[int, str], sharding: Sharding, parameter: Tensor) -> Tensor | None:
    """The part of a gradient that this rank alone counts."""
    gradient, name = parameter.grad, names.get(id(parameter))
    if gradient is None or name is None:
        return gradient
    if gradient.is_sparse:  # it is DDP's, so all ranks have the same
        return gradient if sharding.ranks.is_first else None
    return sharding.own_part(name, local(gradient))


def global_numel(names: Mapping[int, str], sharding: Sharding, parameter: Tensor) -> int:
    """The number of a parameter's elements, on all ranks together."""
    name = names.get(id(parameter))
    return parameter.numel() if name is None else math.prod(sharding.wholes[name])


def shapes_of(model: ModelTensors) -> dict[str, Kind]:
    """Shape (of this rank's shard) and dtype of each tensor, by name."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.tensors.items()}


def tensor_changes(before: Mapping[str, Kind], model: ModelTensors) -> str:
    """How a model's names, shapes and dtypes differ from ``before``, in one line; empty if they don't."""
    if len(before) == len(model.tensors) and all(
        name == known and tensor.shape == kind[0] and tensor.dtype is kind[1]
        for (known, kind), (name, tensor) in zip(before.items(), model.tensors.items(), strict=True)
    ):
        return ""
    now = shapes_of(model)
    new, gone = [n for n in now if n not in before], [n for n in before if n not in now]
    other = [
        f"{n} from {_told(before[n])} to {_told(now[n])}" for n in now if before.get(n, now[n]) != now[n]
    ]
    parts = (("there is now", new), ("there is no more", gone), ("changed", other))
    lines = [
        f"{said} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for said, names in parts
        if names
    ]
    return "; ".join(lines) or "the order of its tensors changed"


def _told(shape: Kind) -> str:
    return f"{shape[0]} {str(shape[1]).removeprefix('torch.')}"


def global_tensors(model: ModelTensors) -> dict[str, Tensor]:
    """The model's tensors in their global shapes, without values (on the meta device)."""
    return {
        name: torch.empty(model.pieces[name].whole, dtype=tensor.dtype, device="meta")
        for name, tensor in model.tensors.items()
    }


def entries_beside(module: nn.Module, model: ModelTensors) -> str:
    """What the module's ``state_dict`` has beside parameters and persistent buffers; empty if nothing.

    These are extra states, and what layers save in their own way: the packed weights of quantised ones.

    Returns:
        One line that says that merges lack it.
    """
    found: list[str] = []
    for prefix, part in module.named_modules():
        kind, start = type(part), f"{prefix}." if prefix else ""
        if kind.get_extra_state is not nn.Module.get_extra_state:
            found.append(f"{start}_extra_state")
        if kind._save_to_state_dict is not nn.Module._save_to_state_dict:
            entries: dict[str, Any] = {}
            with suppress(Exception):  # somebody's own code
                part._save_to_state_dict(entries, start, True)
            found += entries
    known = model.tensors.keys() | model.tied.keys() | model.unfit.keys()
    names = [name for name in map(clean_name, found) if name not in known]
    if not names:
        return ""
    more = f" and {len(names) - 1} more entries" if len(names) > 1 else ""
    return f"merge: merges lack {names[0]!r}{more} of state_dict(), no tensors of the model; {LOADING}"


def check_exclude(patterns: Sequence[str], model: ModelTensors) -> None:
    """Checks that every pattern matches a tensor.

    Raises:
        ValueError: for a pattern that matches no tensor.
    """
    for pattern in patterns:
        if not model.matching([pattern]) and not any(matches_any(name, [pattern]) for name in model.unfit):
            raise ValueError(
                f"exclude={list(patterns)!r}: {pattern!r} matches no tensor of this model; "
                f"names look like {next(iter(model.tensors), None)!r}"
            )
