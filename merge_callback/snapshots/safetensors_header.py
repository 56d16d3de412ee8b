"""The header of a safetensors file, of which nothing is believed: it may be anyone's."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from merge_callback.snapshots.files import CorruptFileError, open_regular
from merge_callback.snapshots.layout import DTYPE_NAMES

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""

_MORE_DTYPES = {
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
# Beyond what a snapshot can hold; the last one came with torch 2.7.
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {
    name: getattr(torch, attribute) for name, attribute in _MORE_DTYPES.items() if hasattr(torch, attribute)
}


class Place(NamedTuple):
    """Where a tensor lies in the data region of its file, in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What a header says.

    Args:
        entries: dtype, shape and byte range of each tensor, by name, as they stand in the file.
        metadata: its ``__metadata__``.
        start: where the data region begins in the file.
        places: where each tensor lies in that region, in its order.
    """

    entries: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int
    places: list[Place]


def read_header(path: Path) -> Header:
    """The header of a file.

    Raises:
        CorruptFileError: if the file breaks any rule of the format, as far as the header tells: a length,
            the JSON, a tensor's entry, or data that does not lie as it says.
        OSError: if it can't be opened.
    """
    with open_regular(path) as file:
        return parse_header(path, *header_text(path, file), os.fstat(file.fileno()).st_size)


def header_text(path: Path, file: IO[bytes]) -> tuple[bytes, int]:
    """The JSON of the header of an open file, and where the data region begins.

    Raises:
        CorruptFileError: if the file is shorter than that.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, LONGEST_HEADER):
        raise CorruptFileError(
            f"{path}: the header length {length} does not fit a file of {size} bytes; "
            "it is cut, or no safetensors file"
        )
    return file.read(length), 8 + length


def parse_header(path: Path, text: bytes, start: int, size: int) -> Header:
    """The header whose JSON was read.

    Args:
        path: of the file, for messages.
        text: the JSON.
        start: where the data region begins.
        size: bytes of the file.

    Raises:
        CorruptFileError: see ``read_header``.
    """
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: the header is not sound JSON ({error})") from None
    if not isinstance(entries, dict):
        raise CorruptFileError(f"{path}: the header is not a JSON object")
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    return Header(entries, metadata, start, _places(path, entries, size - start))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} occurs twice")
    return found


def _metadata(path: Path, found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CorruptFileError(f"{path}: __metadata__ does not map text to text")
    return found


def _places(path: Path, header: Mapping[str, Any], size: int) -> list[Place]:
    """The tensors in the order they lie in the file, which they must fill without gap or overlap."""
    places = sorted((_place(path, *item) for item in header.items()), key=lambda place: place.begin)
    end = 0
    for place in places:
        if place.begin != end:
            raise CorruptFileError(
                f"{path}: tensor {place.name!r} begins at byte {place.begin} of the data, expected {end}: "
                f"tensors must neither overlap nor leave gaps"
            )
        end = place.end
    if end != size:
        raise CorruptFileError(
            f"{path}: the data has {size} bytes, expected {end}; the file is cut or altered: fetch it again"
        )
    return places


def _place(path: Path, name: str, entry: object) -> Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _error(path, name, f"is {entry!r:.200}, expected its dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise _error(path, name, f"has dtype {kind!r:.200}, expected one of {', '.join(_DTYPES)}")
    for sizes in (shape, offsets):
        if not _are_sizes(sizes):
            raise _error(path, name, f"has sizes {sizes!r:.200}, expected a list of whole numbers")
    nbytes = math.prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise _error(path, name, f"lies at {offsets}, expected {nbytes} bytes for {shape} of {kind}")
    return Place(name, dtype, tuple(shape), *offsets)


def _are_sizes(found: object) -> bool:
    return isinstance(found, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in found)


def _error(path: Path, name: str, problem: str) -> CorruptFileError:
    return CorruptFileError(f"{path}: tensor {name!r} {problem}")
