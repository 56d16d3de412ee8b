"""How a model's tensors lie in one flat buffer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

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
    torch.complex64: "C64",
}
"""The dtypes a file can hold, by their names in a safetensors header; a snapshot has pairs for complex64."""

_FP16_UNIT = 2.0**-10


@dataclass(frozen=True)
class Segment:
    """One tensor's place in its group: its elements are those from ``start`` up to, without, ``stop``."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class Group:
    """All tensors of one dtype, back to back.

    ``dtype`` is the model's; ``stored`` is the arena's (they differ under ``snapshot_dtype``). ``static``
    says that these tensors do not train, if the layout keeps those apart; ``is_delta`` that the group does
    not hold the tensors, but how much they differ from the snapshot before.
    """

    dtype: torch.dtype
    stored: torch.dtype
    offset: int
    segments: tuple[Segment, ...]
    static: bool = False
    is_delta: bool = False

    @cached_property
    def key(self) -> tuple[torch.dtype, bool]:
        """What pairs it with the same tensors of another layout."""
        return self.dtype, self.static

    @cached_property
    def unit(self) -> float:
        """What a stored 1 stands for."""
        return delta_unit(self.stored) if self.is_delta else 1.0

    @cached_property
    def numel(self) -> int:
        """Elements in the group."""
        return self.segments[-1].stop

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the group in the arena."""
        return self.numel * self.stored.itemsize

    @cached_property
    def names(self) -> list[str]:
        """The names of its tensors."""
        return [segment.name for segment in self.segments]

    @cached_property
    def stops(self) -> list[int]:
        """One past the last element of each tensor."""
        return [segment.stop for segment in self.segments]


@dataclass(frozen=True)
class Layout:
    """Names, shapes, dtypes and offsets of a model's tensors in one flat buffer (an arena).

    Groups of wider stored dtypes come first, so that every tensor is aligned to its dtype without
    padding: the bytes of the arena are the data region of a safetensors file.
    """

    groups: tuple[Group, ...]

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        float_dtype: torch.dtype | None = None,
        static: Collection[str] = (),
    ) -> Layout:
        """The layout of ``tensors``.

        Args:
            tensors: by name.
            float_dtype: what floating-point tensors are stored as; default: as they are.
            static: names of tensors that are kept apart, and stored as they are.

        Raises:
            ValueError: for a dtype that cannot be stored, or a tensor named ``__metadata__``.
        """
        by_key: dict[tuple[torch.dtype, bool], list[tuple[str, tuple[int, ...]]]] = {}
        for name, tensor in tensors.items():
            check_storable(name, tensor)
            by_key.setdefault((tensor.dtype, name in static), []).append((name, tuple(tensor.shape)))
        groups = [Group(key[0], key[0], 0, _segments(named), key[1]) for key, named in by_key.items()]
        return cls._packed(groups, lambda group: float_dtype)

    @classmethod
    def _packed(
        cls, tensors: Iterable[Group], moving: Callable[[Group], torch.dtype | None], is_delta: bool = False
    ) -> Layout:
        """Groups back to back; those of floating point that are not static, in another dtype if given."""
        groups = []
        for group in tensors:
            other = None if group.static or not group.dtype.is_floating_point else moving(group)
            groups.append(
                replace(group, stored=other or group.dtype, is_delta=is_delta and other is not None)
            )
        offset, packed = 0, []
        for group in sorted(groups, key=lambda g: (-g.stored.itemsize, str(g.dtype), g.static)):
            packed.append(replace(group, offset=offset))
            offset += group.nbytes
        return cls(tuple(packed))

    @cached_property
    def native(self) -> Layout:
        """The same tensors stored in the model's own dtypes; its groups pair with these by ``key``."""
        return self._packed(self.groups, lambda group: None)

    def delta(self, stored: torch.dtype) -> Layout:
        """The same tensors stored as differences in ``stored``, if that is narrower and they do train."""

        def narrower(group: Group) -> torch.dtype | None:
            return stored if group.dtype.itemsize > stored.itemsize else None

        if stored not in self._deltas:
            self._deltas[stored] = self._packed(self.groups, narrower, is_delta=True)
        return self._deltas[stored]

    @cached_property
    def _deltas(self) -> dict[torch.dtype, Layout]:
        return {}

    def only(self, names: Collection[str]) -> Layout:
        """The same without all other tensors."""
        offset, packed = 0, []
        for group in self.groups:
            if kept := [(segment.name, segment.shape) for segment in group.segments if segment.name in names]:
                packed.append(replace(group, offset=offset, segments=_segments(kept)))
                offset += packed[-1].nbytes
        return Layout(tuple(packed))

    def without(self, names: frozenset[str]) -> Layout:
        """The same without these tensors; always the same object for the same names."""
        if not names:
            return self
        if names not in self._without:
            self._without[names] = self.only(self.names - names)
        return self._without[names]

    @cached_property
    def _without(self) -> dict[frozenset[str], Layout]:
        return {}

    def alone(self, name: str) -> Group:
        """One tensor as a group of its own."""
        group, segment = self.places[name]
        offset = group.offset + segment.start * group.stored.itemsize
        return replace(group, offset=offset, segments=_segments([(name, segment.shape)]))

    @cached_property
    def places(self) -> dict[str, tuple[Group, Segment]]:
        """Where each tensor lies."""
        return {segment.name: (group, segment) for group in self.groups for segment in group.segments}

    @cached_property
    def by_key(self) -> dict[tuple[torch.dtype, bool], Group]:
        """The groups by what pairs them with another layout's."""
        return {group.key: group for group in self.groups}

    @cached_property
    def is_delta(self) -> bool:
        """Whether tensors are stored as differences."""
        return any(group.is_delta for group in self.groups)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one arena."""
        return sum(group.nbytes for group in self.groups)

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(segment.name for group in self.groups for segment in group.segments)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, in the order in which they lie."""
        return {segment.name: segment.shape for group in self.groups for segment in group.segments}

    @cached_property
    def static(self) -> frozenset[str]:
        """The names of the tensors that are kept apart, as they do not train."""
        return frozenset(segment.name for group in self.groups if group.static for segment in group.segments)

    @cached_property
    def hash(self) -> str:
        """A SHA-256 over names, shapes, dtypes and offsets: equal hashes mean interchangeable arenas.

        Where tensors are kept apart, it tells which, as that decides what is kept as a difference.
        """
        entries = (
            [s.name, s.shape, DTYPE_NAMES[g.dtype], DTYPE_NAMES[g.stored], s.start, *["still"] * g.static]
            for g in self.groups
            for s in g.segments
        )
        return hashlib.sha256(f"[{in_turns(entries, ', ', ': ')}]".encode()).hexdigest()

    @cached_property
    def entries(self) -> bytes:
        """What a safetensors header says of the tensors: JSON without the braces around all of it."""
        entries = (
            {
                s.name: {
                    "dtype": DTYPE_NAMES[g.stored],
                    "shape": s.shape,
                    "data_offsets": [g.offset + g.stored.itemsize * end for end in (s.start, s.stop)],
                }
            }
            for g in self.groups
            for s in g.segments
        )
        return in_turns(entries).encode()


def in_turns(parts: Iterable[Any], between: str = ",", after_key: str = ":") -> str:
    """The JSON of a long list, or of a dict in parts, without the brackets or braces around it.

    The encoder holds the GIL until it is done: it gets one part at a time.
    """
    encode = json.JSONEncoder(separators=(between, after_key)).encode
    return between.join(encode(part)[1:-1] if isinstance(part, dict) else encode(part) for part in parts)


def _segments(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[Segment, ...]:
    """Tensors back to back."""
    segments, start = [], 0
    for name, shape in shapes:
        segments.append(Segment(name, shape, start, start := start + math.prod(shape)))
    return tuple(segments)


def delta_unit(stored: torch.dtype) -> float:
    """What a 1 stands for in differences of a dtype.

    For fp16 it is 2⁻¹⁰: so weights can move by 64, and moves down to 6e-8 keep all 11 significant bits. What
    is smaller is off by 3e-11 at most.
    """
    return _FP16_UNIT if stored == torch.float16 else 1.0


def check_storable(name: str, tensor: Tensor) -> None:
    """Makes sure that a safetensors file can hold a tensor.

    Raises:
        ValueError: for a dtype that it can't, or the name ``__metadata__``.
    """
    if tensor.dtype not in DTYPE_NAMES:
        other = torch.complex64 if tensor.is_complex() else torch.float32
        raise ValueError(
            f"tensor {name!r} has dtype {tensor.dtype}, which a safetensors file cannot hold; "
            f"register it as a non-persistent buffer, or keep it as {other} "
            f"(supported: {', '.join(str(d).removeprefix('torch.') for d in DTYPE_NAMES)})"
        )
    if name == "__metadata__":
        raise ValueError(
            "a tensor named '__metadata__' cannot be stored in a safetensors file; rename it in the model"
        )
