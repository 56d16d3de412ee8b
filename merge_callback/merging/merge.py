"""Merging plain state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from merge_callback.merging.linear import Weighted
from merge_callback.merging.method import LinearMethod, MergeMethod, resolve_method
from merge_callback.reduce import one_pass


@torch.no_grad()
def merge_state_dicts(
    state_dicts: Sequence[Mapping[str, Tensor]],
    method: str | MergeMethod = "sma",
    *,
    positions: Sequence[float] | None = None,
    exclude: Sequence[str] = (),
    **options: Any,
) -> dict[str, Tensor]:
    """Merges state dicts of one model into a new one.

    Sums in fp32 (fp64 for fp64 tensors) with one cast at the end. Integer and boolean tensors, and those
    whose name matches a pattern of ``exclude``, are copied from the last state dict.

    Args:
        state_dicts: oldest first; equal names, shapes and dtypes. They may lie on any device.
        method: a registered name, or a method object. ``weights=[…]`` alone means ``"weighted"``.
        positions: tokens (or steps) of each, for methods that use the spacing (``wsm``); default: even.
        exclude: ``fnmatch`` patterns of names that are copied, not averaged.
        **options: the method's own options, e.g. ``alpha=0.1`` for ``ema``.

    Returns:
        New tensors, one a name, in the shapes, dtypes and on the devices of the last state dict.

    Raises:
        ValueError: for no state dicts, names, shapes or dtypes that differ (the tensor is named), an
            unknown method, or options it does not have.

    Example::

        merged = merge_state_dicts([torch.load(path) for path in paths], method="ema", alpha=0.1)
    """
    if method == "sma" and "weights" in options:
        method = "weighted"
    resolved = resolve_method(method, **options)
    _check_alike(state_dicts)
    weights = _weights(resolved, positions, len(state_dicts))
    newest = state_dicts[-1]
    return {
        name: newest[name].clone()
        if not _averaged(newest[name]) or matches_any(name, exclude)
        else _merge_tensor([sd[name].to(newest[name].device) for sd in state_dicts], weights)
        for name in newest
    }


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Whether ``name`` matches one of the ``fnmatch`` patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _weights(method: MergeMethod, positions: Sequence[float] | None, count: int) -> list[float]:
    if positions is not None and len(positions) != count:
        raise ValueError(
            f"positions={list(positions)} must name one position for each of {count} state dicts"
        )
    if isinstance(method, Weighted) and len(method.weights) != count:
        raise ValueError(
            f"weights={list(method.weights)} must name one weight for each of {count} state dicts"
        )
    assert isinstance(method, LinearMethod)
    return method.normalised_weights(list(range(count)) if positions is None else positions)


def _averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _merge_tensor(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    if tensors[-1].is_complex():
        return torch.view_as_complex(_merge_tensor([torch.view_as_real(t) for t in tensors], weights))
    out = torch.empty(tensors[-1].shape, dtype=tensors[-1].dtype, device=tensors[-1].device)
    one_pass([t.detach().reshape(-1) for t in tensors], weights, out.view(-1))
    return out


def _check_alike(state_dicts: Sequence[Mapping[str, Tensor]]) -> None:
    if not state_dicts:
        raise ValueError("merge_state_dicts needs at least one state dict, got none")
    last = state_dicts[-1]
    for index, other in enumerate(state_dicts[:-1]):
        if other.keys() != last.keys():
            raise ValueError(
                f"state dict {index} and the last one have different names: "
                f"only in {index} {sorted(other.keys() - last.keys())[:5]}, "
                f"only in the last {sorted(last.keys() - other.keys())[:5]}"
            )
        for name, tensor in other.items():
            for what in ("shape", "dtype"):
                if getattr(tensor, what) != getattr(last[name], what):
                    raise ValueError(
                        f"tensor {name!r}: {what} {getattr(tensor, what)} in state dict {index}, but "
                        f"{getattr(last[name], what)} in the last; merge checkpoints of one model only"
                    )
