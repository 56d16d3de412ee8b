"""Stored running averages of a window: complete, with what they do not average from the newest snapshot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from merge_callback.checkpoints.checkpoint import Checkpoint, read_manifest, step_in_name
from merge_callback.checkpoints.checksums import Recorded, checksums_of_snapshot
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.reader import OpenOptions, Reader
from merge_callback.checkpoints.run_snapshot import complete_snapshot
from merge_callback.checkpoints.spool import default_spool, map_tensors
from merge_callback.checkpoints.stored_snapshot import open_stored
from merge_callback.sharding.pieces import Piece
from merge_callback.snapshots.files import CorruptFileError
from merge_callback.snapshots.mapped_tensors import map_safetensors
from merge_callback.snapshots.running_files import FOLDER_NAME, rank_files
from merge_callback.snapshots.safetensors_file import file_checksum
from merge_callback.snapshots.safetensors_header import read_header
from merge_callback.snapshots.shard_files import Source, gather


class RunningAverageReader(Reader):
    """Reads the folder of a running average that a run has stored in its window."""

    name = "running-average"

    def matches(self, path: Path) -> bool:
        """Whether it is called so."""
        return path.is_dir() and FOLDER_NAME.fullmatch(path.name) is not None

    def open(self, path: Path, options: OpenOptions) -> Checkpoint:
        """The averaged tensors, in fp32, and all others of the newest snapshot; every file is verified."""
        spool = options.spool or default_spool()
        averaged, sources = _averaged(path, spool)
        rest = _newest_snapshot(path.resolve().parent, spool)
        for name, tensor in averaged.items():
            if name not in rest.tensors or rest.tensors[name].shape != tensor.shape:
                raise CorruptFileError(f"{path}: holds {name!r}, which the window's snapshots lack")
        return replace(
            rest,
            path=path,
            tensors={name: averaged.get(name, tensor) for name, tensor in rest.tensors.items()},
            step=step_in_name(path),
            tokens=None,
            files=[source.path for source in sources],
            format=self.name,
            segment=None,
        )

    def step(self, path: Path) -> int | None:
        """That in its name."""
        return step_in_name(path)

    def checksums(self, checkpoint: Checkpoint) -> Sequence[Recorded]:
        """What the names of its files say."""
        return checksums_of_snapshot(checkpoint.files)


def _averaged(path: Path, spool: Path) -> tuple[dict[str, Tensor], list[Source]]:
    """The tensors of a stored average, put together if several ranks have written it."""
    sources = rank_files(path)
    if len(sources) == 1:
        (source,) = sources
        if not file_checksum(source.path).startswith(source.checksum):
            raise CorruptFileError(f"{source.path}: the checksum differs from the one in its name")
        return map_safetensors(source.path)[0], sources
    wanted = {name: Piece.all_of(piece.whole) for s in sources for name, piece in s.pieces.items()}
    held = dict.fromkeys(wanted, 0)
    dtypes: dict[str, torch.dtype] = {}
    for source in sources:
        dtypes |= {place.name: place.dtype for place in read_header(source.path).places}
        for name, piece in source.pieces.items():
            held[name] += piece.numel
    for name, piece in wanted.items():  # before room for it is made
        if held[name] != math.prod(piece.whole):
            raise CorruptFileError(f"{path}: holds {held[name]} elements of {name!r}")
    shapes = {name: (dtypes[name], torch.Size(piece.whole)) for name, piece in wanted.items()}
    found = map_tensors(spool, shapes)
    gather(path, sources, wanted, found)
    return found, sources


def _newest_snapshot(window: Path, spool: Path) -> Checkpoint:
    """The newest snapshot that a window lists.

    Raises:
        FileNotFoundError: if it lists none.
    """
    found = [record["file"] for record in read_manifest(window).snapshots if record.get("file")]
    if not found:
        raise FileNotFoundError(f"{window}: its manifest lists no snapshot")
    file = window / found[-1] if (window / found[-1]).is_dir() else contained(window, found[-1])
    return _opened(file, spool, file.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _opened(file: Path, spool: Path, *unchanged: int) -> Checkpoint:
    return complete_snapshot(open_stored(file, spool), spool)  # the same for all averages of a window
