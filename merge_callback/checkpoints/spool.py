"""Room on disk to lay tensors out in that can't be mapped from the files they are in."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from merge_callback.snapshots.mapped_tensors import as_tensor, view_of
from merge_callback.snapshots.safetensors_header import Place

_ALIGNMENT = 64


def map_tensors(spool: Path, tensors: Mapping[str, tuple[torch.dtype, torch.Size]]) -> dict[str, Tensor]:
    """Uninitialised tensors in a nameless temporary file under ``spool``: room on disk, not in memory.

    The file is gone with the last tensor, or with the process, however that ends.

    Raises:
        OSError: if the room is not there. It is reserved first: a map whose disk fills up would kill the
            process when written to.
    """
    places, end = [], 0
    for name, (dtype, shape) in tensors.items():
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = begin + math.prod(shape) * dtype.itemsize
        places.append(Place(name, dtype, tuple(shape), begin, end))
    data = _reserve(spool, max(end, 1))
    return {place.name: view_of(spool, data, place) for place in places}


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
        return as_tensor(mmap.mmap(file.fileno(), nbytes))
