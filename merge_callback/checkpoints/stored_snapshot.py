"""A snapshot of a window as its own files have it: one file, or a folder with a file of each rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from merge_callback.checkpoints.checkpoint import (
    Checkpoint,
    parse_count,
    read_json,
    segment_of,
    step_in_name,
)
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import SHARDS
from merge_callback.checkpoints.spool import default_spool, map_tensors
from merge_callback.sharding.pieces import Piece
from merge_callback.snapshots.mapped_tensors import map_safetensors
from merge_callback.snapshots.safetensors_file import CorruptFileError, file_checksum
from merge_callback.snapshots.shard_files import gather_shards, parse_shards, read_pieces

_KEYS = {"layout", "lr_step", "phase", "since", "step"}


def is_snapshot(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file with this metadata is a snapshot."""
    return metadata.keys() >= _KEYS


def open_stored(path: Path, spool: Path | None = None) -> Checkpoint:
    """A snapshot, which may be a difference to another one, and lack what it has in common with others.

    Args:
        path: of its file or folder.
        spool: where the tensors of several ranks are put together.

    Raises:
        CorruptFileError: if a file is not what was written.
        ValueError: if it is what snapshots have in common, and no whole model.
        OSError: if a file is missing, or the spool is full.
    """
    if path.is_dir():
        return open_sharded(path, spool)
    tensors, metadata = map_safetensors(path)
    return snapshot_in_file(path, tensors, metadata)


def snapshot_in_file(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Checkpoint:
    """The snapshot in a file that was mapped already.

    Raises:
        ValueError: if it is what snapshots have in common, and no whole model.
    """
    check_whole_model(path, metadata)
    return _snapshot(path, tensors, [path], metadata, parse_count(metadata.get("step")))


def check_whole_model(path: Path, metadata: Mapping[str, str]) -> None:
    """Makes sure that a file holds more than what snapshots have in common.

    Raises:
        ValueError: if it does not.
    """
    if metadata.get("part") == "frozen" and metadata.keys() >= {"layout", "step"}:
        raise ValueError(
            f"{path}: holds what the snapshots in its folder have in common, and no whole model: "
            "give one of those"
        )


def _snapshot(
    path: Path,
    tensors: dict[str, Tensor],
    files: list[Path],
    metadata: Mapping[str, str],
    step: int | None = None,
) -> Checkpoint:
    return Checkpoint(
        path=path,
        tensors=tensors,
        tied={},
        step=step_in_name(path) if step is None else step,
        tokens=parse_count(metadata.get("tokens")),
        files=files,
        format="snapshot",
        difference_to=parse_count(metadata.get("difference_to")),
        frozen=metadata.get("frozen", ""),
        frozen_checksum=metadata.get("frozen_checksum", ""),
        segment=segment_of(metadata),
    )


def open_sharded(folder: Path, spool: Path | None = None, is_part: bool = False) -> Checkpoint:
    """The tensors of a snapshot, put together in a temporary file under ``spool``; every file is verified.

    Args:
        folder: with ``shards.json`` in it.
        spool: a folder on a disk with room for all weights; default: ``$TMPDIR``, else ``/var/tmp``.
        is_part: whether it may be what snapshots have in common, and no whole model.

    Raises:
        CorruptFileError: if a file is not what its rank wrote, or the parts do not make up the tensors.
        ValueError: if it is such a part.
        OSError: if a file is missing, or the spool is full.
    """
    files = [contained(folder, name) for name in parse_shards(read_json(folder, SHARDS), folder / SHARDS)]
    shapes: dict[str, tuple[torch.dtype, torch.Size]] = {}
    held: dict[str, int] = {}
    for file in files:
        tensors, metadata = map_safetensors(file)
        if not is_part:
            check_whole_model(folder, metadata)
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
    return _snapshot(folder, found, files, metadata)


def _pieces(file: Path, metadata: dict[str, str]) -> dict[str, Piece]:
    try:
        return read_pieces(metadata["pieces"])
    except (KeyError, ValueError, RecursionError) as error:
        raise CorruptFileError(f"{file}: does not say which parts it holds ({error!r})") from None
