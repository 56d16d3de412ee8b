"""One flat buffer that holds every tensor of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merge_callback.sharding.live import overwrite
from merge_callback.snapshots.layout import Group, Layout

if TYPE_CHECKING:
    from merge_callback.snapshots.frozen import FrozenPart


class Arena:
    """The tensors of a ``Layout`` in one flat ``uint8`` buffer.

    A snapshot's may lack those that it has in common with others: ``shared`` names what of ``frozen`` belongs
    to it, too.

    Args:
        layout: what lies where.
        buffer: 1-D ``uint8`` of ``layout.nbytes`` bytes, on any device; its first byte must be aligned
            to 8 bytes (what ``torch.empty`` and a memory map give).
    """

    def __init__(self, layout: Layout, buffer: Tensor) -> None:
        if buffer.dtype != torch.uint8 or buffer.shape != (layout.nbytes,):
            raise ValueError(f"expected {layout.nbytes} bytes for the arena, got {tuple(buffer.shape)}")
        self.layout = layout
        self.buffer = buffer
        self.frozen: FrozenPart | None = None
        self.shared: frozenset[str] = frozenset()

    @classmethod
    def empty(cls, layout: Layout, device: torch.device | str = "cpu") -> Arena:
        """An uninitialised arena on ``device``."""
        # The evaluation hooks run under inference mode, whose tensors could not be written to later.
        with torch.inference_mode(False):
            return cls(layout, torch.empty(layout.nbytes, dtype=torch.uint8, device=device))

    def sharing(self, frozen: FrozenPart | None, names: frozenset[str]) -> Arena:
        """Itself, with ``names`` out of a part that others have in common with it."""
        self.frozen, self.shared = frozen if names else None, names
        return self

    def flat(self, group: Group) -> Tensor:
        """The group's elements, 1-D, in the stored dtype (a view)."""
        return self.buffer[group.offset : group.offset + group.nbytes].view(group.stored)

    def find(self, group: Group) -> tuple[Tensor, Group]:
        """What is stored here of another layout's group, or of a single tensor: its elements, and how."""
        holder, stored = self, self.layout.by_key.get(group.key)
        if len(group.segments) == 1:
            name = group.segments[0].name
            if name in self.shared and self.frozen is not None:
                holder = self.frozen.arena
            stored = holder.layout.alone(name)
        assert stored is not None
        return holder.flat(stored), stored

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, in its own shape (views)."""
        return {**self.own_tensors(), **self.shared_tensors()}

    def own_tensors(self) -> dict[str, Tensor]:
        """Those that lie in the buffer."""
        views = {}
        for group in self.layout.groups:
            flat = self.flat(group)
            for segment in group.segments:
                views[segment.name] = flat[segment.start : segment.stop].view(segment.shape)
        return views

    def shared_tensors(self) -> dict[str, Tensor]:
        """Those that it has in common with others."""
        if self.frozen is None:
            return {}
        return {n: t for n, t in self.frozen.arena.own_tensors().items() if n in self.shared}

    @torch.no_grad()
    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrites the buffer with ``tensors``, casting to the stored dtypes.

        Raises:
            ValueError: where a tensor of the layout is missing or has another shape; it is named.
        """
        self.check(tensors)
        for name, view in self.own_tensors().items():
            view.copy_(tensors[name])

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes sure that ``tensors`` has all of the arena's, in the same shapes.

        Raises:
            ValueError: where one is missing or has another shape; it is named.
        """
        for name, view in self.tensors().items():
            if name not in tensors or tensors[name].shape != view.shape:
                found = tuple(tensors[name].shape) if name in tensors else "gone"
                raise ValueError(f"tensor {name!r} is {found}, expected shape {tuple(view.shape)}")

    @torch.no_grad()
    def copy_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrites ``tensors`` in place with the arena, casting to their dtypes."""
        for name, view in self.tensors().items():
            overwrite(tensors[name], view)

    def non_finite(self) -> list[str]:
        """Names of the floating-point tensors that hold NaN or Inf."""
        return [
            segment.name
            for group in self.layout.groups
            if group.dtype.is_floating_point and not all_finite(self.flat(group))
            for segment in group.segments
            if not all_finite(self.flat(group)[segment.start : segment.stop])
        ]


def all_finite(tensor: Tensor, block: int = 1 << 24) -> bool:
    """Whether no element is NaN or Inf (integers always are finite)."""
    # A finite sum proves it in one read; isfinite, which writes a mask, takes ten times as long. A sum of
    # finite values may overflow: then the extremes tell, which pass a NaN on. Blocks bound the copy of a
    # float8 tensor, whose reductions want another dtype.
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    pieces = (_wide(flat[i : i + block]) for i in range(0, flat.numel(), block))
    return all(_finite(piece.sum()) or _finite(torch.stack(torch.aminmax(piece))) for piece in pieces)


def _finite(few: Tensor) -> bool:
    return bool(torch.isfinite(few).all())


def _wide(piece: Tensor) -> Tensor:
    return piece.float() if piece.dtype.itemsize == 1 else piece
