"""Snapshots kept as differences: ``snapshot_codec="delta-fp16"`` or ``"delta-bf16"``.

The oldest snapshot of a window is whole, and each later one is the difference to the one before, in 16 bits::

    x̂_0 = x_0        δ_i = fp16(x_i − x̂_{i−1})        x̂_i = fp32(x̂_{i−1} + δ_i)

It is the difference to what the reader will see, so what one rounding lost the next difference holds: errors
do not add up along the chain, and each is at most 2⁻¹¹ of what a weight has moved since the snapshot before,
or 2⁻⁸ in bf16 (in raw bf16: of the weight). A weighted sum of snapshots is one of what is stored, with other
weights, and so is a distance: linear merges and the diversity read each stored byte once, and decode nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from merge_callback.reduce import one_pass
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.layout import Group

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_OTHERS = (
    "neg",
    "abs",
    "invert",
    "len",
    "iter",
    "bool",
    "float",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "array",
)


Stored = Sequence[tuple[Tensor, Group]]
"""The elements of a group in each snapshot of a window from its oldest on, and how they are stored."""


def delta_weights(stored: Stored, factors: Sequence[float]) -> list[float]:
    """The factors for what is stored that give ``Σ factors[i] · snapshot i``.

    Args:
        stored: what the arenas, whole or differences, hold of a group.
        factors: one per snapshot.
    """
    sums, total = [], 0.0
    for (_, group), factor in zip(reversed(stored), reversed(factors), strict=True):
        total += factor  # a difference is part of every snapshot from its own up to the next whole one
        sums.append(total * group.unit)
        if not group.is_delta:
            total = 0.0
    return sums[::-1]


def encode(arena: Arena, before: Sequence[Arena], out: Arena) -> None:
    """Writes a snapshot as the difference to the one before.

    Args:
        arena: the snapshot, whole.
        before: of the window's snapshots from its oldest on; the last is the one before.
        out: of one of the ``arena.layout.delta``.
    """
    for group in out.layout.groups:
        here, target = arena.flats[group.key], out.flats[group.key]
        if group.is_delta:
            scale = 1 / group.unit  # a power of two: it rounds nothing
            flats, factors = _last(before, group)
            # The one before first, summed up as a reader does it: this one corrects its roundings.
            one_pass([*flats, here], [*(-scale * factor for factor in factors), scale], target)
        else:
            target.copy_(here)


def decode(arenas: Sequence[Arena], out: Arena) -> None:
    """Writes the last of a window's snapshots whole.

    Args:
        arenas: of the window's snapshots from its oldest on.
        out: of the whole layout.
    """
    for group in out.layout.groups:
        flats, factors = _last(arenas, group)
        if len(flats) == 1:
            out.flats[group.key].copy_(flats[0])
        else:
            one_pass(flats, factors, out.flats[group.key])


def flat_tensors(arenas: Sequence[Arena], names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Tensors of the last of a window's snapshots, flat; those kept as differences as ``Decoded``.

    Args:
        arenas: of the window's snapshots from its oldest on.
        names: of those that are asked for, by default all; others than the snapshot's are left out. Each one
            costs microseconds.
    """
    last, tensors = arenas[-1], dict[str, Tensor]()
    known: dict[object, tuple[list[Tensor], list[float]]] = {}
    for name in [*last.shared, *last.layout.shapes] if names is None else names:
        if name in last.shared:
            tensors[name] = last.holder(name).flat(name)
        elif place := last.layout.places.get(name):
            group, segment = place
            if group.key not in known:
                known[group.key] = _last(arenas, group)
            flats, factors = known[group.key]
            if len(flats) == 1:
                tensors[name] = flats[0][segment.start : segment.stop]
            else:
                parts = [flat[segment.start : segment.stop] for flat in flats]
                tensors[name] = cast(Tensor, Decoded(parts, factors))
    return tensors


def _last(arenas: Sequence[Arena], group: Group) -> tuple[list[Tensor], list[float]]:
    """What has to be summed up of a group, and with which factors, to give the last snapshot's.

    Args:
        arenas: of the window's snapshots from its oldest on.
        group: of any of their layouts.
    """
    flats, factors = list[Tensor](), list[float]()
    for arena in reversed(arenas):  # those before the last one that is whole may hold other tensors
        flat, stored = arena.find(group)
        flats.append(flat)
        factors.append(stored.unit)
        if not stored.is_delta:
            break
    return flats[::-1], factors[::-1]


class Decoded:
    """A flat tensor that is a sum of stored ones: read like a tensor, summed up where it is read.

    A slice costs memory for the slice alone. Everything else that is done with a tensor works on the whole.

    Args:
        parts: 1-D, of one size and device; summed in order, in the first one's dtype.
        units: what a 1 stands for in each.
    """

    def __init__(self, parts: Sequence[Tensor], units: Sequence[float]) -> None:
        self.parts, self.units = parts, units
        self.dtype, self.device = parts[0].dtype, parts[0].device

    def numel(self) -> int:
        """Elements."""
        return self.parts[0].numel()

    def __getitem__(self, index: Any) -> Tensor:
        if not isinstance(index, slice):
            return self[:][index]
        parts = [part[index] for part in self.parts]
        out = torch.empty_like(parts[0])
        one_pass(parts, self.units, out)
        return out

    def __getattr__(self, name: str) -> Any:
        if name == "data_ptr" or name.startswith("__"):  # of memory that would be gone at once
            raise AttributeError(name)
        return getattr(self[:], name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args, kwargs = tree_map(lambda value: value[:] if isinstance(value, cls) else value, (args, kwargs))
        return func(*args, **(kwargs or {}))


def _on_the_whole(name: str) -> Callable[..., Any]:
    def operate(self: Decoded, *others: Any) -> Any:
        return getattr(self[:], name)(*others)

    return operate


# Python looks for these on the class, and asks no __getattr__ there.
for _name in (
    *(f"__{way}{name}__" for name in _BINARY for way in ("", "r")),
    *(f"__{name}__" for name in _OTHERS),
):
    setattr(Decoded, _name, _on_the_whole(_name))
