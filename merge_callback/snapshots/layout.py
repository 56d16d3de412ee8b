"""How a model's tensors lie in one flat buffer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The dtypes a snapshot can hold, by their names in a safetensors header."""


@dataclass(frozen=True)
class Segment:
    """One tensor's place in its group: ``numel`` elements from element ``start`` on."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.numel


@dataclass(frozen=True)
class Group:
    """All tensors of one dtype, back to back.

    ``dtype`` is the model's; ``stored`` is the arena's (they differ under ``snapshot_dtype``).
    """

    dtype: torch.dtype
    stored: torch.dtype
    offset: int
    segments: tuple[Segment, ...]

    @property
    def numel(self) -> int:
        """Elements in the group."""
        return self.segments[-1].stop

    @property
    def nbytes(self) -> int:
        """Bytes of the group in the arena."""
        return self.numel * self.stored.itemsize


@dataclass(frozen=True)
class Layout:
    """Names, shapes, dtypes and offsets of a model's tensors in one flat buffer (an arena).

    Groups of wider stored dtypes come first, so that every tensor is aligned to its dtype without
    padding: the bytes of the arena are the data region of a safetensors file.
    """

    groups: tuple[Group, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], float_dtype: torch.dtype | None = None) -> Layout:
        """The layout of ``tensors``, with floating-point tensors stored as ``float_dtype`` if given.

        Raises:
            ValueError: for a dtype that cannot be stored, or a tensor named ``__metadata__``.
        """
        by_dtype: dict[torch.dtype, list[tuple[str, Tensor]]] = {}
        for name, tensor in tensors.items():
            check_storable(name, tensor)
            by_dtype.setdefault(tensor.dtype, []).append((name, tensor))
        return cls._packed({dtype: _segments(named) for dtype, named in by_dtype.items()}, float_dtype)

    @classmethod
    def _packed(
        cls, segments: Mapping[torch.dtype, tuple[Segment, ...]], float_dtype: torch.dtype | None
    ) -> Layout:
        stored = {d: float_dtype if float_dtype and d.is_floating_point else d for d in segments}
        groups: list[Group] = []
        offset = 0
        for dtype in sorted(segments, key=lambda d: (-stored[d].itemsize, str(d))):
            groups.append(Group(dtype, stored[dtype], offset, segments[dtype]))
            offset += groups[-1].nbytes
        return cls(tuple(groups))

    @cached_property
    def native(self) -> Layout:
        """The same tensors stored in the model's own dtypes; its groups pair with these by ``dtype``."""
        return self._packed({group.dtype: group.segments for group in self.groups}, None)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one arena."""
        return sum(group.nbytes for group in self.groups)

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(segment.name for group in self.groups for segment in group.segments)

    @cached_property
    def hash(self) -> str:
        """A SHA-256 over names, shapes, dtypes and offsets: equal hashes mean interchangeable arenas."""
        entries = [
            [s.name, s.shape, DTYPE_NAMES[g.dtype], DTYPE_NAMES[g.stored], s.start]
            for g in self.groups
            for s in g.segments
        ]
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _segments(named: list[tuple[str, Tensor]]) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    start = 0
    for name, tensor in named:
        segments.append(Segment(name, tuple(tensor.shape), start, tensor.numel()))
        start += tensor.numel()
    return tuple(segments)


def check_storable(name: str, tensor: Tensor) -> None:
    """Makes sure that a safetensors file can hold a tensor.

    Raises:
        ValueError: for a dtype that it can't, or the name ``__metadata__``.
    """
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(
            f"tensor {name!r} has dtype {tensor.dtype}, which a snapshot cannot hold; "
            f"register it as a non-persistent buffer, or keep it as {torch.float32} "
            f"(supported: {', '.join(str(d).removeprefix('torch.') for d in DTYPE_NAMES)})"
        )
    if name == "__metadata__":
        raise ValueError(
            "a tensor named '__metadata__' cannot be stored in a safetensors file; rename it in the model"
        )
