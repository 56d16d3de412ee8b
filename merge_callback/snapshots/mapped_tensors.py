"""Safetensors files as memory: their tensors are read in place."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from merge_callback.snapshots.files import CorruptFileError, open_regular
from merge_callback.snapshots.safetensors_header import Place, header_text, parse_header

# Without it, Linux refuses a private map larger than the machine's memory, as if all of it were to be written
# (measured: torch.from_file of 60 GB fails on 24 GB). Python names the constant from 3.13 on.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def map_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file as views of a private memory map, in file order; and its metadata.

    A tensor that does not start at a multiple of its item size (some writers pad nothing) is copied: the
    kernels take aligned memory for granted.

    Raises:
        CorruptFileError: if the file breaks any rule of the format; nothing of it is read then.
        OSError: if it can't be opened.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        header = parse_header(path, *header_text(path, file), size)
        data = _map(path, file, size)[header.start :]
    return {place.name: view_of(path, data, place) for place in header.places}, header.metadata


def _map(path: Path, file: IO[bytes], size: int) -> Tensor:
    try:
        with torch.inference_mode(False):
            return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError:  # larger than the memory: see _NORESERVE
        # Not for every file, because Python's map keeps a file descriptor, and ten models of 191 shards
        # would have more than the 1024 that a process may open.
        flags = mmap.MAP_PRIVATE | _NORESERVE
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        return as_tensor(mmap.mmap(file.fileno(), size, flags=flags, prot=protection))


def as_tensor(mapped: mmap.mmap) -> Tensor:
    """A map as 1-D ``uint8``."""
    with torch.inference_mode(False):
        return torch.frombuffer(mapped, dtype=torch.uint8)  # the tensor keeps the map alive


def view_of(path: Path, data: Tensor, place: Place) -> Tensor:
    """A tensor in a data region, which is 1-D ``uint8``; a copy of it if it is not aligned.

    Raises:
        CorruptFileError: if it has a shape that no tensor can have.
    """
    piece = data[place.begin : place.end]
    if piece.data_ptr() % place.dtype.itemsize:
        piece = piece.clone()
    try:
        if not piece.numel():  # an empty slice may start anywhere
            return torch.empty(place.shape, dtype=place.dtype)
        return piece.view(place.dtype).view(place.shape)
    except (RuntimeError, OverflowError) as error:
        raise CorruptFileError(f"{path}: tensor {place.name!r} of shape {place.shape}: {error}") from None
