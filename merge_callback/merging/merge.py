"""Merging plain state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merge_callback.checks import matches_any
from merge_callback.merging.linear import Weighted
from merge_callback.merging.method import Inputs, MergeMethod, Trajectory, resolve_method
from merge_callback.sharding.live import as_real


@torch.no_grad()
def merge_state_dicts(
    state_dicts: Sequence[Mapping[str, Tensor]],
    method: str | MergeMethod = "sma",
    *,
    positions: Sequence[float] | None = None,
    steps: Sequence[int] | None = None,
    base: Mapping[str, Tensor] | None = None,
    exclude: Sequence[str] = (),
    **options: Any,
) -> dict[str, Tensor]:
    """Merges state dicts of one model into a new one.

    Computes in fp32 (fp64 for fp64 tensors) with one cast at the end. Integer and boolean tensors, and those
    whose name matches a pattern of ``exclude``, are copied from the last state dict.

    Args:
        state_dicts: oldest first; equal names, shapes and dtypes. They may lie on any device.
        method: a registered name, or a method object. ``weights=[…]`` alone means ``"weighted"``.
        positions: tokens (or steps) of each, for methods that use the spacing (``wsm``); default: even.
        steps: optimizer steps of each, which randomness is keyed on; default: 0, 1, 2, ….
        base: θ_init of the methods on task vectors; default: the first state dict. It is not merged itself.
        exclude: ``fnmatch`` patterns of names that are copied, not averaged.
        **options: the method's own options, e.g. ``alpha=0.1`` for ``ema``.

    Returns:
        New tensors by name, with the shapes, dtypes and devices of the last state dict.

    Raises:
        ValueError: for no state dicts, names, shapes or dtypes that differ (the tensor is named), an
            unknown method, options it does not have, or a base that it does not use; for values that are NaN
            or infinite in a tensor that is averaged.

    Example::

        merged = merge_state_dicts([torch.load(path) for path in paths], method="ema", alpha=0.1)
    """
    if method == "sma" and "weights" in options:
        method = "weighted"
    resolved = resolve_method(method, **options)
    bases = [] if base is None else [("the base", base)]
    check_alike([*bases, *((f"state dict {i}", state_dict) for i, state_dict in enumerate(state_dicts))])
    trajectory = _trajectory(resolved, positions, steps, len(state_dicts))
    newest, state_dicts = state_dicts[-1], resolved.select(state_dicts)
    trajectory = Trajectory(resolved.select(trajectory.positions), resolved.select(trajectory.steps))
    if base is not None and "task vectors" not in resolved.needs:
        raise ValueError(f"method {resolved.name!r} uses no base; leave it out")
    kept = {n for n, t in newest.items() if not is_averaged(t) or matches_any(n, exclude)}
    merged = {
        n: t.clone() if n in kept else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for n, t in newest.items()
    }
    for name in newest:
        if name not in kept:
            _check_finite(name, [*bases, *((f"state dict {i}", s) for i, s in enumerate(state_dicts))])
    state_dicts, trajectory = resolved.arranged(state_dicts, trajectory)
    model = [_inputs(name, state_dicts, base) for name in newest if name not in kept]
    survey = resolved.survey(model, trajectory)
    for inputs in model:
        resolved.merge(inputs, flat_numbers(merged[inputs.name]), trajectory, survey)
    return merged


def _check_finite(name: str, models: Sequence[tuple[str, Mapping[str, Tensor]]]) -> None:
    for label, model in models:
        tensor = model[name].float() if model[name].itemsize == 1 else model[name]  # float8
        if not (finite := tensor.isfinite()).all():
            count = int(finite.numel() - finite.sum())
            kind = "NaN" if tensor.isnan().any() else "infinite"
            raise ValueError(
                f"tensor {name!r} of {label} holds {count} values that are {kind}: leave it out, or "
                f"copy the tensor from the last one with exclude=[{name!r}]"
            )


def _trajectory(
    method: MergeMethod, positions: Sequence[float] | None, steps: Sequence[int] | None, count: int
) -> Trajectory:
    for option, given in (("positions", positions), ("steps", steps)):
        if given is not None and len(given) != count:
            raise ValueError(f"{option}={list(given)} must name one for each of {count} state dicts")
    if isinstance(method, Weighted) and len(method.weights) != count:
        raise ValueError(
            f"weights={list(method.weights)} must name one weight for each of {count} state dicts"
        )
    even = Trajectory.even(count)
    return Trajectory(positions or even.positions, steps or even.steps)


def is_averaged(tensor: Tensor) -> bool:
    """Whether a tensor's values have a mean: not those of integers and truth values."""
    return tensor.is_floating_point() or tensor.is_complex()


def _inputs(
    name: str, state_dicts: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor] | None
) -> Inputs:
    device = state_dicts[-1][name].device
    tensors = [flat_numbers(state_dict[name].detach().to(device)) for state_dict in state_dicts]
    return Inputs(name, tensors, None if base is None else flat_numbers(base[name].detach().to(device)))


def flat_numbers(tensor: Tensor) -> Tensor:
    """A flat view of a tensor; a complex number counts as two real ones."""
    return as_real(tensor).reshape(-1)


_ALIKE = {
    "shape": "merge checkpoints of one model only",
    "dtype": "convert all to one dtype first",
}
"""What the tensors of one name have in common, and what to do if they have not."""


def check_alike(models: Sequence[tuple[str, Mapping[str, Tensor]]]) -> None:
    """Checks that models have the same tensors.

    Args:
        models: each model's label for errors, and its tensors by name.

    Raises:
        ValueError: for no models, or names, shapes or dtypes that differ; the tensor is named.
    """
    if not models:
        raise ValueError("a merge needs at least one model, got none")
    for label, model in models:
        if strange := next((name for name, tensor in model.items() if not isinstance(tensor, Tensor)), None):
            raise ValueError(
                f"{label} is not a state dict: {strange!r} is a {type(model[strange]).__name__}; from a "
                "Lightning checkpoint take ['state_dict']"
            )
    newest, last = models[-1]
    for label, other in models[:-1]:
        if other.keys() != last.keys():
            raise ValueError(
                f"{label} and {newest} have different names: "
                f"only in the former {sorted(other.keys() - last.keys())[:5]}, "
                f"only in the latter {sorted(last.keys() - other.keys())[:5]}"
            )
        for name, tensor in other.items():
            for what, mend in _ALIKE.items():
                if getattr(tensor, what) != getattr(last[name], what):
                    raise ValueError(
                        f"tensor {name!r}: {what} {getattr(tensor, what)} in {label}, but "
                        f"{getattr(last[name], what)} in {newest}; {mend}"
                    )
