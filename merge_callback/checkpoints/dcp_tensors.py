"""The tensors of a distributed checkpoint, read by one process, whatever number of them wrote."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.dcp_metadata import read_metadata
from merge_callback.checkpoints.file_names import METADATA
from merge_callback.checkpoints.pytorch_file import short_reasons
from merge_callback.checkpoints.spool import default_spool, map_tensors
from merge_callback.checkpoints.training_state import (
    check_no_repeats,
    is_container,
    only_state,
    training_state,
)
from merge_callback.snapshots.safetensors_file import CorruptFileError

_MOST_CELLS = 10_000_000
# What torch raises for a part that is not what was saved.
_BROKEN = (RuntimeError, AssertionError, LookupError, TypeError, ValueError, EOFError, pickle.UnpicklingError)


class Read(NamedTuple):
    """What was read of a distributed checkpoint.

    Args:
        tensors: by name.
        files: that were read.
        place: the keys that lead to the one state dict in it, with dots between; empty if names are flat, or
            of several state dicts.
        left_out: the names of the tensors that are training state.
    """

    tensors: dict[str, Tensor]
    files: list[Path]
    place: str
    left_out: list[str]


def read_dcp(folder: Path, spool: Path | None = None) -> Read:
    """The tensors of a distributed checkpoint, put together in a temporary file under ``spool``.

    Only one saved chunk at a time is in memory. The names are those that DCP gives to nested state
    (``model.layers.0.weight``); entries that are no tensors are ignored. What was saved under a key named
    like training state (``optimizer``, ``optimizer_0``, ``lr_scheduler``, ``rng``, …), at any depth, is left
    out, and so is what flat names tell to be such (``training_state``); a name within a state dict
    (``optimizer.weight``) is no such key.

    Args:
        folder: with ``.metadata`` in it.
        spool: a folder on a disk with room for all weights; default: ``$TMPDIR``, else ``/var/tmp``.

    Returns:
        The tensors and what was found beside them.

    Raises:
        ValueError: if ``.metadata`` would run code, or holds no weights.
        CorruptFileError: if the parts do not make up the tensors.
        OSError: if a file is missing, or the spool is full.
    """
    metadata = read_metadata(contained(folder, METADATA))
    entries = _weights(folder, metadata)
    files = check_entries(folder, metadata, entries)
    check_no_repeats(folder, {name: entry.size for name, entry in entries.items()})
    shapes = {name: (entry.properties.dtype, entry.size) for name, entry in entries.items()}
    tensors = map_tensors(spool or default_spool(), shapes)
    fill(folder, metadata, entries, tensors)
    every = metadata.state_dict_metadata.items()
    state = sorted(n for n, e in every if isinstance(e, TensorStorageMetadata) and n not in entries)
    place = _place(tensors, metadata.planner_data)
    return Read(tensors, [folder / METADATA, *files], place, state)


def _weights(folder: Path, metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    entries = metadata.state_dict_metadata
    tensors = {str(n): e for n, e in entries.items() if isinstance(e, TensorStorageMetadata)}
    state = training_state(
        {name: getattr(getattr(e, "properties", None), "dtype", None) for name, e in tensors.items()}
    )
    kept = {n: e for n, e in tensors.items() if n not in state and not _is_beside(n, metadata.planner_data)}
    if not kept:
        other = only_state(tensors) if tensors else "holds no tensors; give a checkpoint that has the model"
        raise ValueError(f"{folder}: {other}")
    if "__metadata__" in kept:
        raise ValueError(f"{folder}: '__metadata__' is no name for a tensor in a safetensors file; rename it")
    return kept


def _is_beside(name: str, paths: Any) -> bool:
    """Whether one of the keys that lead to an entry is named like training state."""
    keys = _keys_to(name, paths)
    if keys is None:
        keys = tuple(name.split(".")[:1]) if "." in name else ()
    return any(is_container(key) for key in keys)


def _keys_to(name: str, paths: Any) -> tuple[Any, ...] | None:
    """The keys of nested state that lead to an entry, without its own; ``None`` if that is not recorded."""
    path = paths.get(name) if isinstance(paths, Mapping) else None
    return path[:-1] if isinstance(path, tuple) else None


def _place(names: Iterable[str], paths: Any) -> str:
    places = [_keys_to(name, paths) for name in names]
    place = ".".join(map(str, places[0] or ()))
    one = all(keys == places[0] for keys in places) and all(name.startswith(f"{place}.") for name in names)
    return place if one else ""


def check_entries(
    folder: Path, metadata: Metadata, entries: Mapping[str, TensorStorageMetadata]
) -> list[Path]:
    """Makes sure that all parts of the tensors are there and make them up; returns the files they are in.

    Raises:
        CorruptFileError: if they are not.
    """
    try:
        parts = [
            (name, entry, chunk, metadata.storage_data.get(MetadataIndex(name, chunk.offsets, index)))
            for name, entry in entries.items()
            for index, chunk in enumerate(_check_entry(folder, name, entry))
        ]
        files = sorted({str(place.relative_path) for *_, place in parts if place is not None})
        sizes = {file: contained(folder, file).stat().st_size for file in files}
        for name, entry, chunk, place in parts:
            _check_part(f"{folder}: tensor {name!r}", entry, chunk, place, sizes)
    except (AttributeError, TypeError) as error:  # records without their fields, or with others' values
        raise CorruptFileError(f"{folder / METADATA}: not sound ({error})") from None
    return [folder / file for file in files]


def _check_entry(folder: Path, name: str, entry: TensorStorageMetadata) -> list[ChunkStorageMetadata]:
    where, dtype, layout = f"{folder}: tensor {name!r}", entry.properties.dtype, entry.properties.layout
    if not isinstance(dtype, torch.dtype) or layout != torch.strided:
        raise ValueError(f"{where} has dtype {dtype} and layout {layout}, expected a dense one")
    shapes = [entry.size, *(shape for chunk in entry.chunks for shape in (chunk.offsets, chunk.sizes))]
    if any(len(shape) != len(entry.size) or not all(type(n) is int for n in shape) for shape in shapes):
        raise CorruptFileError(f"{where}: its shape {entry.size} and those of its parts do not go together")
    _check_tiling(where, entry.size, entry.chunks)
    return entry.chunks


def _check_part(
    where: str,
    entry: TensorStorageMetadata,
    chunk: ChunkStorageMetadata,
    place: _StorageInfo | None,
    sizes: Mapping[str, int],
) -> None:
    if place is None:
        raise CorruptFileError(f"{where}: no file is known to hold its part at {list(chunk.offsets)}")
    end, size = place.offset + place.length, sizes[str(place.relative_path)]
    packed = bool(getattr(place, "transform_descriptors", None))  # e.g. compressed, by an extension of DCP
    fits = packed or place.length >= math.prod(chunk.sizes) * entry.properties.dtype.itemsize
    if place.offset < 0 or end > size:
        raise CorruptFileError(
            f"{where}: {place.relative_path} has {size} bytes, expected its part up to byte {end}; "
            "the file is cut or altered: fetch it again"
        )
    if not fits:
        raise CorruptFileError(
            f"{where}: {place.length} bytes are recorded for its part of shape {list(chunk.sizes)}, which "
            "has more; .metadata is altered: fetch it again"
        )


def _check_tiling(where: str, size: torch.Size, chunks: Iterable[ChunkStorageMetadata]) -> None:
    """Makes sure that the chunks cover every element once: what none covers would stay unwritten."""
    if 0 in size:
        return
    boxes = [
        [(begin, begin + extent) for begin, extent in zip(chunk.offsets, chunk.sizes, strict=True)]
        for chunk in chunks
        if 0 not in chunk.sizes
    ]
    sides = [(0, extent) for extent in size]
    # All boundaries along a dimension cut the tensor into cells, each of which one chunk must cover.
    cuts = [sorted({*side, *(b for box in boxes for b in box[d])}) for d, side in enumerate(sides)]
    fits = all(lo < hi for box in boxes for lo, hi in box)
    fits = fits and all((cut[0], cut[-1]) == side for cut, side in zip(cuts, sides, strict=True))
    if fits and math.prod(len(cut) - 1 for cut in cuts) <= _MOST_CELLS:
        cells = torch.zeros([len(cut) - 1 for cut in cuts], dtype=torch.int32)
        numbers = [{boundary: i for i, boundary in enumerate(cut)} for cut in cuts]
        for box in boxes:
            cells[tuple(slice(n[lo], n[hi]) for n, (lo, hi) in zip(numbers, box, strict=True))] += 1
        if bool((cells == 1).all()):
            return
    raise CorruptFileError(
        f"{where}: its {len(boxes)} parts do not cover its shape {list(size)} exactly once"
    )


class _IntoTensors(DefaultLoadPlanner):
    """Lets the reader copy every chunk to its place in the given tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of a tensor that a chunk is read into."""
        tensor = self.tensors[read_item.dest_index.fqn]
        for dim, (begin, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, begin, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: the bytes are where they belong."""


def fill(
    folder: Path,
    metadata: Metadata,
    entries: Mapping[str, TensorStorageMetadata],
    tensors: Mapping[str, Tensor],
) -> None:
    """Reads tensors, whose entries were checked, into the given ones.

    Raises:
        CorruptFileError: if a part is not what was saved.
    """
    reader, planner = FileSystemReader(folder), _IntoTensors(tensors)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    for name, entry in entries.items():
        everything = ChunkStorageMetadata(torch.Size([0] * len(entry.size)), entry.size)
        for item in create_read_items_for_chunk_list(name, entry, [everything]):
            try:  # one by one: within one call the reader holds a chunk while it reads the next
                with short_reasons():
                    reader.read_data(LoadPlan([item]), planner)
            except _BROKEN as error:
                reason = " ".join(str(error).split())
                raise CorruptFileError(
                    f"{folder}: tensor {name!r} cannot be read ({type(error).__name__}: {reason:.120})"
                ) from None
