"""One update of running averages: which live tensors go into which parts, and the blend itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from merge_callback.sharding.sharding import Sharding
from merge_callback.snapshots.layout import Layout

_BLOCK = 1 << 22
"""Elements of a narrower dtype that are widened at once."""


class LiveSources:
    """This rank's part of the live tensors, in the order of a layout; made again only if they are others."""

    def __init__(self, sharding: Sharding, layout: Layout) -> None:
        self._sharding, self._layout = sharding, layout
        self._seen: Mapping[str, Tensor] | None = None
        self._live: list[Tensor] = []
        self._places: list[int] = []
        self._own: list[Tensor] = []
        self.are_wide = False
        """Whether they have the dtypes that they are averaged in."""

    def of(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Those of some live tensors, by name."""
        is_new = tensors is not self._seen
        if is_new:
            self._live, self._seen = [tensors[name] for name in self._layout.shapes], tensors
            kept = [group.stored for group in self._layout.groups for _ in group.segments]
            self.are_wide = all(
                tensor.dtype == dtype and type(tensor) in (Tensor, Parameter)
                for tensor, dtype in zip(self._live, kept, strict=True)
            )
        if self._sharding.ranks.size == 1:
            return self._live
        places = [tensor.data_ptr() for tensor in self._live]
        if is_new or places != self._places:  # a view does not follow its tensor to another place
            named = zip(self._layout.shapes, self._live, strict=True)
            self._own = [self._sharding.own_part(name, tensor.data) for name, tensor in named]
            self._places = places
        return self._own


def averaged_layout(sharding: Sharding, tensors: Mapping[str, Tensor], left_out: Collection[str]) -> Layout:
    """How averages lie in their arenas: all that is floating point and not left out, in fp32."""
    averaged = {n: t for n, t in tensors.items() if t.is_floating_point() and n not in left_out}
    wide = {name for name, tensor in averaged.items() if tensor.dtype == torch.float64}
    return Layout.of(sharding.own(averaged), torch.float32, wide)


def lerp(targets: list[Tensor], sources: list[Tensor], weight: float, are_wide: bool) -> None:
    """``target += weight (source − target)`` of each pair, in the targets' dtypes; sources may be narrower.

    Averages move by a millionth at a step. This form, unlike β · target + (1 − β) · source, does not drift
    when it is rounded.

    Args:
        targets: the averages.
        sources: the live tensors, of the same shapes.
        weight: 1 − β.
        are_wide: whether all sources have their targets' dtypes.
    """
    if are_wide:
        torch._foreach_lerp_(targets, sources, weight)
        return
    for target, source in zip(targets, sources, strict=True):
        if target.dtype == source.dtype or not (target.is_contiguous() and source.is_contiguous()):
            target.lerp_(source.to(target.dtype), weight)
            continue
        parts = zip(torch.split(target.view(-1), _BLOCK), torch.split(source.view(-1), _BLOCK), strict=True)
        for part, narrow in parts:
            part.lerp_(narrow.to(part.dtype), weight)
