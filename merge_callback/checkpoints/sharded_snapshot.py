"""A snapshot that several ranks kept, from the window's folder of a sharded run."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from merge_callback.checkpoints.checkpoint import (
    NOT_ALONE,
    Checkpoint,
    is_frozen_part,
    parse_count,
    read_json,
    segment_of,
    step_in_name,
)
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import SHARDS
from merge_callback.checkpoints.mapped_file import default_spool, map_safetensors, map_tensors
from merge_callback.sharding.pieces import Piece
from merge_callback.snapshots.safetensors_file import CorruptFileError, file_checksum
from merge_callback.snapshots.shard_files import gather_shards, parse_shards, read_pieces


def open_sharded_snapshot(folder: Path, spool: Path | None = None, is_part: bool = False) -> Checkpoint:
    """The tensors of a snapshot, put together in a temporary file under ``spool``; every file is verified.

    Args:
        folder: with ``shards.json`` in it.
        spool: a folder on a disk with room for all weights; default: ``$TMPDIR``, else ``/var/tmp``.
        is_part: whether it may be what snapshots have in common, and no whole model.

    Raises:
        CorruptFileError: where a file is not what its rank wrote, or the parts do not make up the tensors.
        ValueError: where it is such a part.
        OSError: where a file is missing, or the spool is full.
    """
    files = list(listed(folder))
    shapes: dict[str, tuple[torch.dtype, torch.Size]] = {}
    held: dict[str, int] = {}
    for file in files:
        tensors, metadata = map_safetensors(file)
        if is_frozen_part(metadata) and not is_part:
            raise ValueError(f"{folder}: {NOT_ALONE}")
        for name, piece in _pieces(file, metadata).items():
            if name not in tensors or tensors[name].numel() != piece.numel:
                raise CorruptFileError(f"{file}: does not hold the part of {name!r} that it should")
            known = shapes.setdefault(name, (tensors[name].dtype, torch.Size(piece.whole)))
            if known != (tensors[name].dtype, torch.Size(piece.whole)):
                raise CorruptFileError(f"{file}: {name!r} has another dtype or shape than in other files")
            held[name] = held.get(name, 0) + piece.numel
    for name, (_, shape) in shapes.items():  # before room for it is made
        if held[name] != math.prod(shape):
            raise CorruptFileError(
                f"{folder}: holds {held[name]} elements of {name!r}, which has {list(shape)}"
            )
    found = map_tensors(spool or default_spool(), shapes)
    everything = {name: Piece.all_of(shape) for name, (_, shape) in shapes.items()}
    try:
        gather_shards(folder, file_checksum(folder / SHARDS), everything, found)
    except (RuntimeError, LookupError, TypeError) as error:
        raise CorruptFileError(f"{folder}: the parts do not fit together ({error!r})") from None
    return Checkpoint(
        path=folder,
        tensors=found,
        tied={},
        step=step_in_name(folder),
        tokens=parse_count(metadata.get("tokens")),
        files=files,
        extras=[],
        format="snapshot",
        difference_to=parse_count(metadata.get("difference_to")),
        frozen=metadata.get("frozen", ""),
        frozen_checksum=metadata.get("frozen_checksum", ""),
        segment=segment_of(metadata),
    )


def listed(folder: Path) -> dict[Path, str]:
    """The files of a sharded snapshot with their checksums.

    Raises:
        CorruptFileError: where the list is not one, or names what is no rank's file.
        FileNotFoundError: where one is missing.
    """
    files = parse_shards(read_json(folder, SHARDS), folder / SHARDS)
    return {contained(folder, name): checksum for name, checksum in files.items()}


def _pieces(file: Path, metadata: dict[str, str]) -> dict[str, Piece]:
    try:
        return read_pieces(metadata["pieces"])
    except (KeyError, ValueError, RecursionError) as error:
        raise CorruptFileError(f"{file}: does not say which parts it holds ({error!r})") from None
