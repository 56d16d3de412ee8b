"""Where in a checkpoint the weights are: many trainers keep them under a key of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.checkpoints.stand_ins import kind_of
from merge_callback.checkpoints.training_state import is_container, only_state

_WEIGHTS = {"model", "module", "net", "network", "weights", "params", "parameters", "state_dict"}
_WEIGHTS |= {f"{name}_{kind}" for name in ("model", "net", "network") for kind in ("state", "weights")}
_DEEPEST = 4


def find_state(path: Path, content: Mapping[Any, Any], key: str | None = None) -> Mapping[Any, Any]:
    """The state dict in the content of a ``torch.save`` file.

    It is what ``key`` names, if that is given; else the entry ``state_dict``; else the whole content, if it
    maps names to tensors; else the one entry, at any depth, that does, outside of what is named like training
    state. Of several, the one that is named as weights are (``model``, ``model_state_dict``, …) is taken if
    no other is named so; between a model and its average it is not chosen.

    Args:
        path: of the file, for messages.
        content: of it.
        key: of an entry; of one within another, with dots between.

    Raises:
        ValueError: if there is none, or no telling which.
    """
    if key is not None or "state_dict" in content:
        return _named(path, content, key or "state_dict")
    if _is_state(content):
        return content
    found = dict(_states(content))
    weights = [place for place in found if _is_called_weights(place)] or list(found)
    if len(weights) == 1:
        return found[weights[0]]
    keys = ", ".join(repr(k) for k in list(content)[:8])
    if not found and any(isinstance(value, Tensor) for value in content.values()):
        return content  # of which what is no tensor will be refused by name
    if found:
        raise ValueError(
            f"{path}: holds several state dicts ({', '.join(weights[:8])}); say which with --state-key, "
            f"e.g. --state-key {weights[0]}"
        )
    if content and all(is_container(k) or k in ("state", "param_groups") for k in content):
        raise ValueError(f"{path}: {only_state(map(str, content))}")
    raise ValueError(
        f"{path}: holds no tensors by name among its entries ({keys}); give a checkpoint that has the model"
    )


def under_key(checkpoint: Checkpoint, key: str | None) -> Checkpoint:
    """What a checkpoint of flat names has below ``key.``, by the rest of its names; all of it for ``None``.

    Raises:
        ValueError: if there is nothing.
    """
    if key is None:
        return checkpoint
    start = f"{key}."
    tensors = {n.removeprefix(start): t for n, t in checkpoint.tensors.items() if n.startswith(start)}
    if not tensors:
        first = next(iter(checkpoint.tensors))
        raise ValueError(
            f"{checkpoint.path}: --state-key {key!r} begins no tensor's name; the first is {first!r}"
        )
    tied = {
        alias.removeprefix(start): kept.removeprefix(start)
        for alias, kept in checkpoint.tied.items()
        if alias.startswith(start) and kept.startswith(start)
    }
    return replace(checkpoint, tensors=tensors, tied=tied)


def is_extra(name: object) -> bool:
    """Whether an entry of a state dict is what a module's ``get_extra_state`` made."""
    return isinstance(name, str) and name.endswith("_extra_state")


def _named(path: Path, content: Mapping[Any, Any], key: str) -> Mapping[Any, Any]:
    state: Any = content
    for part in [key] if key in content else key.split("."):
        if not isinstance(state, Mapping) or part not in state:
            places = ", ".join(dict(_states(content))) or "nowhere"
            raise ValueError(f"{path}: has no entry {key!r}; state dicts are at: {places}")
        state = state[part]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: its {key!r} is a {kind_of(state)}, expected names mapped to tensors")
    if not any(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path}: the state dict holds no tensors")
    return state


def _is_state(content: Mapping[Any, Any]) -> bool:
    values = [value for name, value in content.items() if not is_extra(name)]
    return bool(values) and all(isinstance(value, Tensor) for value in values)


def _states(
    content: Mapping[Any, Any], place: tuple[str, ...] = ()
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """The state dicts in nested mappings, outermost only, each by the keys that lead to it."""
    for key, value in content.items():
        if (
            isinstance(value, Mapping)
            and isinstance(key, str)
            and not is_container(key)
            and len(place) < _DEEPEST
        ):
            if _is_state(value) and all(isinstance(name, str) for name in value):
                yield ".".join((*place, key)), value
            else:
                yield from _states(value, (*place, key))


def _is_called_weights(place: str) -> bool:
    """Whether a place is called like a model's weights, or like their average."""
    last = place.rpartition(".")[2].lower()
    parts = last.split("_")
    return (
        last in _WEIGHTS
        or bool({"ema", "swa", "averaged", "avg", "model", "net"} & {*parts})
        or "state_dict" in last
    )
