"""Whether what does not train has changed all the same: it is kept once for all snapshots of a window."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from merge_callback.snapshots.arena import FrozenPart
from merge_callback.snapshots.layout import Group, Segment

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By their size in bytes: equal floats may have other bits (0 and -0), and NaN is equal to nothing."""

_RUN = 1 << 20  # bytes of neighbours that are compared at once

_BLOCK = 1 << 22  # elements that are fingerprinted at once: 32 MiB each of numbers and of factors


def note_fingerprints(part: FrozenPart, live: Mapping[str, Tensor]) -> None:
    """Remembers the fingerprints of live tensors that are on a device, where the part's arena will not be."""
    part.prints = {name: fingerprint(live[name]) for name in part.names if not _is_near(live[name])}


def drop_moved(part: FrozenPart, live: Mapping[str, Tensor]) -> frozenset[str]:
    """The names of those that are not, bit for bit, what they were; they count as frozen no more.

    In host memory the bytes are compared. Of a model on a device fingerprints are, which are made there:
    one small read waits for the device, once per snapshot, and only if something is frozen.
    """
    same, away = set[str](), list[str]()
    for group in part.arena.layout.groups:
        here = [s for s in group.segments if s.name in part.names and _fits(live.get(s.name), s, group)]
        away += [s.name for s in here if not _is_near(live[s.name])]
        for run in _runs([s for s in here if _is_near(live[s.name])], _RUN // group.stored.itemsize):
            same |= _same(run, live, part.arena.flats[group.key])
    if away:
        now = torch.stack([fingerprint(live[name]) for name in away])
        for name in away:
            if name not in part.prints:  # the run was resumed
                part.prints[name] = fingerprint(part.arena.tensor(name)).to(now.device)
        equal = (now == torch.stack([part.prints[name] for name in away])).all(1).tolist()
        same |= {name for name, is_equal in zip(away, equal, strict=True) if is_equal}
    moved = part.names - same
    part.names -= moved
    part.has_moved |= bool(moved)
    return moved


def same_bytes(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype and shape in host memory are equal bit for bit."""
    if (compare := _memcmp()) and tensor.is_contiguous() and other.is_contiguous():
        return not compare(tensor.data_ptr(), other.data_ptr(), tensor.nbytes)
    integers = _INTEGERS[tensor.itemsize]
    return torch.equal(tensor.view(integers), other.view(integers))


def fingerprint(tensor: Tensor) -> Tensor:
    """Two sums over a tensor's bytes, each four of them times a factor of their place: int64, on its device.

    A multilinear hash: that two tensors which differ have the same one has a chance of 2⁻⁶⁴, wherever they
    differ.
    """
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    size = next(size for size in (4, 2, 1) if flat.numel() % size == 0)
    bits = (flat.clone() if flat.storage_offset() % size else flat).view(_INTEGERS[size])
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for place, start in enumerate(range(0, bits.numel(), _BLOCK)):
        numbers = bits[start : start + _BLOCK].long()
        for index, factors in enumerate(_factors(tensor.device)):
            # Odd, so that no factor loses bits.
            total[index] += (numbers * factors[: numbers.numel()]).sum() * (2 * _mixed(place) + 1)
    return total


@lru_cache(maxsize=2)
def _factors(device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0x5EED)
    low, high = -(1 << 63), (1 << 63) - 1
    return [torch.randint(low, high, (_BLOCK,), generator=generator).to(device) for _ in range(2)]


def _mixed(place: int) -> int:
    """A number of 62 bits that looks random, of a block's place."""
    number = (place + 1) * 0x9E3779B97F4A7C15 % (1 << 64)
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    return (number ^ (number >> 27)) >> 2


def _is_near(live: Tensor) -> bool:
    """Whether a live tensor's bytes can be read where the window's are."""
    return live.is_cpu


def _fits(live: Tensor | None, segment: Segment, group: Group) -> bool:
    return live is not None and live.shape == segment.shape and live.dtype == group.stored


def _runs(segments: Iterable[Segment], most: int) -> Iterator[list[Segment]]:
    """Neighbours of ``most`` elements together, or one that has more."""
    run: list[Segment] = []
    for segment in segments:
        if run and (run[-1].stop != segment.start or segment.stop - run[0].start > most):
            yield run
            run = []
        run.append(segment)
    if run:
        yield run


def _same(run: Sequence[Segment], live: Mapping[str, Tensor], flat: Tensor) -> set[str]:
    """The names of those neighbours whose live tensors are what is kept, bit for bit."""
    if len(run) > 1:  # thousands of small ones are copied together faster than each is compared
        together: Tensor = torch._utils._flatten_dense_tensors([live[s.name] for s in run])  # type: ignore[no-untyped-call]
        if same_bytes(together, flat[run[0].start : run[-1].stop]):
            return {s.name for s in run}
    return {s.name for s in run if same_bytes(live[s.name], flat[s.start : s.stop].view(s.shape))}


@lru_cache
def _memcmp() -> Any:
    """The C library's comparison, as fast as a copy; three times as fast as PyTorch's of 32-bit elements."""
    if sys.platform == "win32":
        return None
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return compare
