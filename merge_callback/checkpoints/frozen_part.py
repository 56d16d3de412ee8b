"""What a snapshot of a window has in common with the others, and so is not in its own file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import SHARDS
from merge_callback.checkpoints.stored_snapshot import open_sharded
from merge_callback.snapshots.files import printable
from merge_callback.snapshots.mapped_tensors import map_safetensors
from merge_callback.snapshots.safetensors_file import CorruptFileError, file_checksum

_NAME = re.compile(r"frozen-step=\d+-[0-9a-f]{12}(\.safetensors)?")


def with_frozen_part(checkpoint: Checkpoint, spool: Path | None = None) -> Checkpoint:
    """A snapshot with all its tensors: those that are frozen lie in another file of the window's folder.

    Args:
        checkpoint: as its own file has it.
        spool: where the tensors of several ranks are put together.

    Raises:
        CorruptFileError: if that file is missing, or not, byte for byte, what the snapshot was taken with.
        OSError: if it can't be read, or the spool is full.
    """
    name, folder = checkpoint.frozen, checkpoint.path.resolve().parent
    if not _NAME.fullmatch(name):
        raise CorruptFileError(f"{checkpoint.path}: names {name!r:.100} as the file of what is frozen")
    place = folder / name
    if not place.exists():
        raise CorruptFileError(
            f"{checkpoint.path}: its frozen tensors are in {name}, which is not in {printable(str(folder))}: "
            "give the snapshot in its window's folder, or put both files there"
        )
    if place.is_dir():
        _check(contained(place, SHARDS), checkpoint.frozen_checksum)
        part = open_sharded(place, spool, is_part=True)
        tensors, files = part.tensors, part.files
    else:
        file = contained(folder, name)
        _check(file, checkpoint.frozen_checksum)
        tensors, files = map_safetensors(file)[0], [file]
    return replace(
        checkpoint,
        tensors=_together(checkpoint, tensors),
        files=[*checkpoint.files, *files],
        frozen="",
    )


def _together(checkpoint: Checkpoint, frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**checkpoint.tensors, **{n: t for n, t in frozen.items() if n not in checkpoint.tensors}}


def _check(file: Path, checksum: str) -> None:
    found = file.stat()
    if _checksum(file, found.st_ino, found.st_size, found.st_mtime_ns) != checksum:
        raise CorruptFileError(f"{file}: the checksum differs from the one that the snapshots name")


@lru_cache(maxsize=8)
def _checksum(file: Path, *unchanged: int) -> str:
    return file_checksum(file)  # once for all snapshots: it may be most of the model
