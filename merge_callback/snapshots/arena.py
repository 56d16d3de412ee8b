"""One flat buffer that holds every tensor of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter, eq
from typing import Any, ClassVar

import torch
from torch import Tensor

from merge_callback.sharding.live import as_real, overwrite
from merge_callback.snapshots.layout import Group, Layout
from merge_callback.snapshots.staging import copying, fetch, send

_IS_CUDA, _SHAPE = attrgetter("is_cuda"), attrgetter("shape")


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
        self._views: dict[str, Tensor] = {}

    @classmethod
    def empty(cls, layout: Layout, device: torch.device | str = "cpu") -> Arena:
        """An uninitialised arena on ``device``."""
        # The evaluation hooks run under inference mode, whose tensors could not be written to later.
        with torch.inference_mode(False):
            return cls(layout, torch.empty(layout.nbytes, dtype=torch.uint8, device=device))

    def reused(self) -> Arena:
        """An arena in the same memory, to be overwritten; the views of its tensors are not made again."""
        arena = Arena(self.layout, self.buffer)
        arena._views = self._views
        arena.flats = self.flats
        return arena

    def sharing(self, frozen: FrozenPart | None, names: frozenset[str]) -> Arena:
        """Itself, with ``names`` out of a part that others have in common with it."""
        self.frozen, self.shared = frozen if names else None, names
        return self

    @cached_property
    def flats(self) -> dict[tuple[torch.dtype, bool], Tensor]:
        """The elements of each group, 1-D, in the stored dtype (views), by the group's key."""
        # Under inference mode, views could not be written to later either.
        with torch.inference_mode(False):
            return {
                group.key: self.buffer[group.offset : group.offset + group.nbytes].view(group.stored)
                for group in self.layout.groups
            }

    def find(self, group: Group) -> tuple[Tensor, Group]:
        """What is stored here of another layout's group, or of a single tensor: its elements, and how."""
        stored = self.layout.by_key.get(group.key)
        if len(group.segments) == 1 and (stored is None or stored.names != group.names):
            name = group.names[0]
            holder = self.holder(name)
            return holder.flat(name), holder.layout.alone(name)
        assert stored is not None
        return self.flats[group.key], stored

    def holder(self, name: str) -> Arena:
        """The arena that one of its tensors lies in: itself, or that of what it has in common with others."""
        return self.frozen.arena if self.frozen is not None and name in self.shared else self

    def flat(self, name: str) -> Tensor:
        """The elements of a tensor that lies in the buffer, 1-D, in the stored dtype (a view)."""
        group, segment = self.layout.places[name]
        return self.flats[group.key][segment.start : segment.stop]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, in its own shape (views)."""
        return {**self.own_tensors(), **self.shared_tensors()}

    def own_tensors(self) -> Mapping[str, Tensor]:
        """Those that lie in the buffer. Their views are kept: making them takes longer than copying."""
        if not self._views:
            views = {}  # of its own until it is whole: training and the background may both ask
            with torch.inference_mode(False):
                for group in self.layout.groups:
                    flat = self.flats[group.key]
                    parts = torch.split(flat, [segment.numel for segment in group.segments])
                    for segment, part in zip(group.segments, parts, strict=True):
                        views[segment.name] = part.view(segment.shape)
            self._views = views
        return self._views

    def shared_tensors(self) -> dict[str, Tensor]:
        """Those that it has in common with others."""
        if self.frozen is None:
            return {}
        return {n: t for n, t in self.frozen.arena.own_tensors().items() if n in self.shared}

    def tensor(self, name: str) -> Tensor:
        """One of its tensors (a view)."""
        holder = self.holder(name)
        return holder.flat(name).view(holder.layout.shapes[name])

    def spans(self, names: Iterable[str]) -> list[tuple[bool, int, int]]:
        """Where tensors lie, in this order; those that lie next to each other are one span.

        Returns:
            Whether a span is of what the arena has in common with others; its first byte; one past its last.
        """
        spans: list[tuple[bool, int, int]] = []
        for name in names:
            holder = self.holder(name)
            is_shared = holder is not self
            group, segment = holder.layout.places[name]
            start, stop = (
                group.offset + end * group.stored.itemsize for end in (segment.start, segment.stop)
            )
            if spans and spans[-1][0] == is_shared and spans[-1][2] == start:
                start = spans.pop()[1]
            spans.append((is_shared, start, stop))
        return spans

    def bytes_of(self, is_shared: bool, start: int, stop: int) -> Tensor:
        """The bytes of a span (a view)."""
        holder = self.frozen.arena if self.frozen is not None and is_shared else self
        return holder.buffer[start:stop]

    @torch.no_grad()
    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrites the buffer with ``tensors``, casting to the stored dtypes.

        Raises:
            ValueError: if a tensor of the layout is missing or has another shape; it is named.
        """
        views = self.own_tensors()
        try:  # without Python for each tensor, as training waits
            sources = list(map(tensors.__getitem__, views))
            fits = all(map(eq, map(_SHAPE, sources), self.layout.shapes.values()))
        except KeyError:
            fits = False
        if not fits or self.frozen is not None:
            self.check(tensors)
        targets, stop = list(views.values()), 0
        for group in self.layout.groups:
            start, stop = stop, stop + len(group.segments)
            _copy_all(targets[start:stop], sources[start:stop])

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes sure that ``tensors`` has all of the arena's, in the same shapes.

        Raises:
            ValueError: if one is missing or has another shape; it is named.
        """
        expected = self.layout.shapes
        if self.frozen is not None:
            shapes = self.frozen.arena.layout.shapes
            expected = expected | {name: shapes[name] for name in self.shared}
        for name, shape in expected.items():
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != shape:
                found = "gone" if tensor is None else tuple(tensor.shape)
                raise ValueError(f"tensor {name!r} is {found}, expected shape {shape}")

    @torch.no_grad()
    def copy_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrites ``tensors`` in place with the arena, casting to their dtypes."""
        pairs = [(tensors[name], view) for name, view in self.tensors().items()]
        if not self.buffer.is_cuda:
            send((tensor, copying(view)) for tensor, view in pairs if tensor.is_cuda)
            pairs = [pair for pair in pairs if not pair[0].is_cuda]
        for tensor, view in pairs:
            overwrite(tensor, view)

    def non_finite(self) -> list[str]:
        """Names of the floating-point tensors that hold NaN or Inf."""
        names: list[str] = []
        for group in self.layout.groups:
            if group.dtype.is_floating_point and not all_finite(flat := self.flats[group.key]):
                names += [s.name for s in group.segments if not all_finite(flat[s.start : s.stop])]
        return names


@dataclass(eq=False)
class FrozenPart:
    """Tensors that the snapshots of a window have in common; what this rank keeps of them.

    That a parameter takes no gradient proves nothing: a target network is written to all the same, and layers
    are unfrozen. So the live tensors are compared with ``arena`` whenever a snapshot is taken, and what has
    changed once is kept with every snapshot from then on.

    Args:
        step: of the snapshot that it was first kept with.
        arena: of what was frozen then.
        names: of the tensors in it that have not changed since.
        file: in the window's folder; ``checksum`` is its SHA-256. As those of a ``Snapshot``.
        has_moved: whether some have changed since the file was last compared with what was written to it.
        is_placed: whether it lies in the window's storage.
        prints: fingerprints of the live tensors that are on a device.
    """

    kind: ClassVar[str] = "frozen-"
    difference_to: ClassVar[None] = None

    step: int
    arena: Arena
    names: frozenset[str]
    file: str = ""
    checksum: str = ""
    has_moved: bool = False
    is_placed: bool = False
    prints: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def record(self) -> dict[str, Any]:
        """What its file says of it, as primitives."""
        return {"step": self.step, "part": "frozen"}


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies tensors of one dtype each to its target, all in one call: without Python between them."""
    # Before CUDA is in use no tensor is there, and asking 20,000 of them takes 3 ms.
    may_be_there = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if may_be_there and targets and not targets[0].is_cuda and any(map(_IS_CUDA, sources)):
        pairs = list(zip(targets, sources, strict=True))
        fetch(pair for pair in pairs if pair[1].is_cuda)
        pairs = [pair for pair in pairs if not pair[1].is_cuda]
        targets, sources = [target for target, _ in pairs], [source for _, source in pairs]
    try:
        # What no_grad still has autograd do for each tensor is a fifth of the time.
        with torch.inference_mode():
            torch._foreach_copy_(targets, sources)
    except (RuntimeError, TypeError):  # a subclass of Tensor need not know that operation
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def all_finite(tensor: Tensor, block: int = 1 << 24) -> bool:
    """Whether no element is NaN or Inf (integers always are finite)."""
    # A finite sum proves it in one read; isfinite, which writes a mask, takes ten times as long. A sum of
    # finite values may overflow: then the extremes tell, which pass a NaN on. Blocks bound the copy of a
    # float8 tensor, whose reductions want another dtype.
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    flat = as_real(tensor).reshape(-1)
    for start in range(0, flat.numel(), block):
        piece = flat[start : start + block]
        piece = piece.float() if piece.dtype.itemsize == 1 else piece
        few = piece.sum()
        if not few.isfinite() and not torch.stack(torch.aminmax(piece)).isfinite().all():
            return False
    return True
