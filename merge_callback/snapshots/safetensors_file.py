"""Safetensors files written durably, and read back as memory maps.

The library's own writer needs every tensor at once, does not fsync and hashes nothing; the format itself
is a length, a JSON header and the bytes, so it is written here: streaming, hashed on the way, fsynced.
Reading checks what the library checks on opening (header, offsets, size) plus the checksum on request.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.files import CorruptFileError, open_regular, sync, write_json
from merge_callback.snapshots.layout import DTYPE_NAMES, Layout, in_turns
from merge_callback.snapshots.safetensors_header import header_text, parse_header

__all__ = [
    "CorruptFileError",
    "arena_header",
    "difference",
    "file_checksum",
    "map_arena",
    "map_new_file",
    "sync",
    "tensors_entries",
    "tensors_header",
    "write_file",
    "write_json",
]

_PAGE = 4096
_CHUNK = 1 << 24


def arena_header(layout: Layout) -> dict[str, dict[str, Any]]:
    """The safetensors header entries of an arena's tensors: dtype, shape and byte range of each."""
    header: dict[str, dict[str, Any]] = json.loads(b"{" + layout.entries + b"}")
    return header


def tensors_header(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The header entries of tensors written one after the other, in the given order."""
    return dict(_entries(tensors))


def tensors_entries(tensors: Mapping[str, Tensor]) -> bytes:
    """The same as JSON, without the braces around all of it."""
    return in_turns({name: entry} for name, entry in _entries(tensors)).encode()


def _entries(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Any]]]:
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        offsets = [begin, end]
        yield name, {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        begin = end


def write_file(
    path: Path, header: Mapping[str, Any] | bytes, chunks: Iterable[Tensor], metadata: Mapping[str, str]
) -> str:
    """Writes a safetensors file and makes it durable.

    Args:
        path: a file that does not exist yet, usually under a temporary name.
        header: what ``arena_header`` or ``tensors_header`` gives; or their JSON (a layout's ``entries``).
        chunks: CPU tensors whose bytes, one after the other, are the data region.
        metadata: string to string, kept under ``__metadata__``.

    Returns:
        The SHA-256 of the whole file, in hex.

    Raises:
        OSError: when the disk is full, read-only or gone; the partial file is removed.
    """
    text = _header_bytes(header, metadata)
    digest = hashlib.sha256()
    try:
        with open(path, "xb") as file:
            for piece in chain([text], _pieces(chunks)):
                file.write(piece)
                digest.update(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def map_new_file(path: Path, header: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[Tensor, int]:
    """Makes a safetensors file whose data region is written through a memory map.

    Returns:
        The data region, 1-D ``uint8``, and its offset in the file.

    Raises:
        OSError: if there is no room; the file is removed. (Later on, a full disk would kill the process.)
    """
    text = _header_bytes(header, metadata)
    size = len(text) + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    try:
        with open(path, "xb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            file.write(text)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    mapped = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
    return mapped[len(text) :], len(text)


def map_arena(path: Path, layout: Layout) -> Arena:
    """A snapshot file as an arena: a private memory map, so that the page cache holds the data.

    Raises:
        CorruptFileError: if the header is unreadable or of another layout, or the size is wrong.
        OSError: if the file is missing or unreadable.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        text, data_start = header_text(path, file)
    if not _has_entries(text, layout.entries):
        entries = parse_header(path, text, data_start, size).entries
        if different := difference(entries, arena_header(layout)):
            raise CorruptFileError(f"{path}: other tensors than this model's: {different}")
    if size != data_start + layout.nbytes:
        raise CorruptFileError(f"{path}: {size} bytes, expected {data_start + layout.nbytes}")
    with torch.inference_mode(False):
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return Arena(layout, mapped[data_start:])


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """How one header's tensors differ from another's, in one line; empty if they don't."""
    if found == expected:
        return ""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        return f"missing {missing[:3]} ({len(missing)} in all), unexpected {extra[:3]} ({len(extra)} in all)"
    name = next(n for n in expected if found[n] != expected[n])
    return f"{name!r} is {found[name]}, expected {expected[name]}"


def _has_entries(text: bytes, entries: bytes) -> bool:
    """Whether a header has these entries, and metadata before them: found without parsing 20,000 tensors."""
    end = text.find(b'"},') + 2  # of the metadata, which is string to string
    if not text.startswith(entries, end + 1) or text[end + 1 + len(entries) :].rstrip(b" ") != b"}":
        return False
    try:
        return list(json.loads(text[:end] + b"}")) == ["__metadata__"]
    except (ValueError, RecursionError):
        return False


def file_checksum(path: Path) -> str:
    """The SHA-256 of a file, in hex (what ``sha256sum`` prints)."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _header_bytes(header: Mapping[str, Any] | bytes, metadata: Mapping[str, str]) -> bytes:
    """All of a file that comes before its data."""
    if not isinstance(header, bytes):
        header = in_turns({name: entry} for name, entry in header.items()).encode()
    begin = in_turns([{"__metadata__": dict(metadata)}]).encode()
    text = b"".join([b"{", begin, b"," if header else b"", header, b"}"])
    # Padded to a page, so that the mapped data region is aligned for every dtype.
    text += b" " * (-(8 + len(text)) % _PAGE)
    return len(text).to_bytes(8, "little") + text


def _pieces(chunks: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    for tensor in chunks:
        flat = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        yield from (flat[i : i + _CHUNK] for i in range(0, len(flat), _CHUNK))
