"""Files as memory: safetensors files read in place, and room on disk to lay tensors out in."""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from merge_callback.snapshots.files import CorruptFileError, open_regular
from merge_callback.snapshots.layout import DTYPE_NAMES
from merge_callback.snapshots.safetensors_file import LONGEST_HEADER

_ALIGNMENT = 64
_MORE_DTYPES = {
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "C64": "complex64",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
# Beyond what a snapshot can hold; the last one came with torch 2.7.
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {
    name: getattr(torch, attribute) for name, attribute in _MORE_DTYPES.items() if hasattr(torch, attribute)
}
# Without it, Linux refuses a private map larger than the machine's memory, as if all of it were to be written
# (measured: torch.from_file of 60 GB fails on 24 GB). Python names the constant from 3.13 on.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Place(NamedTuple):
    """Where a tensor lies in the data region of its file, in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def map_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file as views of a private memory map, in file order; and its metadata.

    A tensor that does not start at a multiple of its item size (some writers pad nothing) is copied: the
    kernels take aligned memory for granted.

    Raises:
        CorruptFileError: where the file breaks any rule of the format; nothing of it is read then.
        OSError: where it can't be opened.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _read_header(path, file, size)
        metadata = _metadata(path, header.pop("__metadata__", {}))
        places = _places(path, header, size - start)
        data = _map(path, file, size)[start:]
    return {place.name: _view(path, data, place) for place in places}, metadata


def map_tensors(spool: Path, tensors: Mapping[str, tuple[torch.dtype, torch.Size]]) -> dict[str, Tensor]:
    """Uninitialised tensors in a nameless temporary file under ``spool``: room on disk, not in memory.

    The file is gone with the last tensor, or with the process, however that ends.

    Raises:
        OSError: where the room is not there. It is reserved first: a map whose disk fills up would kill the
            process when written to.
    """
    places, end = [], 0
    for name, (dtype, shape) in tensors.items():
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = begin + math.prod(shape) * dtype.itemsize
        places.append(Place(name, dtype, tuple(shape), begin, end))
    data = _reserve(spool, max(end, 1))
    return {place.name: _view(spool, data, place) for place in places}


def default_spool() -> Path:
    """Where checkpoints in parts are put together, if nobody says where."""
    # Not /tmp: on many machines that is memory.
    places = (os.environ.get("TMPDIR", ""), "/var/tmp")
    return Path(next((place for place in places if place and os.path.isdir(place)), tempfile.gettempdir()))


def _reserve(spool: Path, nbytes: int) -> Tensor:
    with tempfile.TemporaryFile(dir=spool) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            message = f"{error.strerror}: no room for {nbytes} bytes of tensors; give another spool folder"
            raise OSError(error.errno, message, str(spool)) from None
        return _as_tensor(mmap.mmap(file.fileno(), nbytes))


def _map(path: Path, file: IO[bytes], size: int) -> Tensor:
    try:
        with torch.inference_mode(False):
            return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError:  # larger than the memory: see _NORESERVE
        # Not for every file, because Python's map keeps a file descriptor, and ten models of 191 shards
        # would have more than the 1024 that a process may open.
        flags = mmap.MAP_PRIVATE | _NORESERVE
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        return _as_tensor(mmap.mmap(file.fileno(), size, flags=flags, prot=protection))


def _as_tensor(mapped: mmap.mmap) -> Tensor:
    with torch.inference_mode(False):
        return torch.frombuffer(mapped, dtype=torch.uint8)  # the tensor keeps the map alive


def _view(path: Path, data: Tensor, place: Place) -> Tensor:
    piece = data[place.begin : place.end]
    if piece.data_ptr() % place.dtype.itemsize:
        piece = piece.clone()
    try:
        if not piece.numel():  # an empty slice may start anywhere
            return torch.empty(place.shape, dtype=place.dtype)
        return piece.view(place.dtype).view(place.shape)
    except (RuntimeError, OverflowError) as error:
        raise CorruptFileError(f"{path}: tensor {place.name!r} of shape {place.shape}: {error}") from None


def _read_header(path: Path, file: IO[bytes], size: int) -> tuple[dict[str, Any], int]:
    # Stricter than the reader of our own files: this file may be anyone's.
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, LONGEST_HEADER):
        raise CorruptFileError(
            f"{path}: the header length {length} does not fit a file of {size} bytes; "
            "it is cut, or no safetensors file"
        )
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: the header is not sound JSON ({error})") from None
    if not isinstance(header, dict):
        raise CorruptFileError(f"{path}: the header is not a JSON object")
    return header, 8 + length


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
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptFileError(f"{where} is {entry!r:.200}, expected its dtype, shape and data_offsets")
    if entry["dtype"] not in list(_DTYPES):  # a list: what is not hashable is merely not in it
        raise CorruptFileError(
            f"{where} has dtype {entry['dtype']!r:.200}, expected one of {', '.join(_DTYPES)}"
        )
    shape, offsets = tuple(_sizes(where, entry["shape"])), tuple(_sizes(where, entry["data_offsets"]))
    dtype = _DTYPES[entry["dtype"]]
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise CorruptFileError(
            f"{where} lies at {list(offsets)}, expected {math.prod(shape) * dtype.itemsize} bytes "
            f"for {list(shape)} of {entry['dtype']}"
        )
    return Place(name, dtype, shape, *offsets)


def _sizes(where: str, found: object) -> Iterator[int]:
    if not isinstance(found, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in found):
        raise CorruptFileError(f"{where} has sizes {found!r:.200}, expected a list of whole numbers")
    yield from found
