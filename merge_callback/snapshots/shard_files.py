"""A snapshot of several ranks on disk: a folder with a file of each, and last of all a list of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_callback.sharding.pieces import Box, Piece
from merge_callback.sharding.sharding import Sharding
from merge_callback.snapshots.files import make_folder, parse_object, read_small
from merge_callback.snapshots.layout import Layout, in_turns
from merge_callback.snapshots.mapped_tensors import map_safetensors
from merge_callback.snapshots.safetensors_file import (
    CorruptFileError,
    difference,
    file_checksum,
    sync,
    write_file,
    write_json,
)
from merge_callback.snapshots.safetensors_header import read_header

SHARDS = "shards.json"
"""What lists the files of a snapshot that several ranks have written, in its folder."""


def shards_name(step: int, session: str, is_delta: bool = False) -> str:
    """The folder of a snapshot: two timelines of one run, having other sessions, never share one."""
    return f"step={step:08d}-{session}" + ("-delta" if is_delta else "")


def step_of(name: str, session: str) -> int | None:
    """The step of a folder's snapshot, if it is this session's."""
    found = re.fullmatch(rf"(?:frozen-|running-[\w.-]+-)?step=(\d+)-{session}(-delta)?", name)
    return int(found[1]) if found else None


def shard_file(rank: int, size: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}-of-{size:05d}.safetensors"


def a_file(path: Path) -> Path:
    """A file of the snapshot at ``path``, which has the same tensors as those of all ranks."""
    return next(iter(sorted(path.glob("rank-*.safetensors"))), path) if path.is_dir() else path


def write_shard(
    folder: Path,
    sharding: Sharding,
    layout: Layout,
    data: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> str:
    """Writes what this rank keeps; returns the file's SHA-256.

    Raises:
        OSError: if it can't be written.
    """
    make_folder(folder)
    path = folder / shard_file(sharding.ranks.rank, sharding.ranks.size)
    path.unlink(missing_ok=True)
    checksum = write_file(
        path, layout.entries, data, {**metadata, "pieces": _to_json(sharding, layout.shapes)}
    )
    sync(folder)
    return checksum


def list_shards(folder: Path, checksums: Sequence[str], write: bool) -> str:
    """Lists a complete snapshot's files with their checksums; returns the list's own SHA-256.

    Raises:
        OSError: if it can't be written.
    """
    files = {shard_file(rank, len(checksums)): checksum for rank, checksum in enumerate(checksums)}
    content = {"format": 1, "files": files}
    if write:
        write_json(folder / SHARDS, content)
        sync(folder.parent)
    return hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()


def listed_shards(folder: Path, checksum: str) -> dict[str, str]:
    """The files of a snapshot with their checksums.

    Raises:
        CorruptFileError: if the list is not the one with this checksum.
        OSError: if it is missing: the snapshot was never completed.
    """
    path = folder / SHARDS
    text = read_small(path)
    if hashlib.sha256(text).hexdigest() != checksum:
        raise CorruptFileError(f"{path}: the checksum differs from the recorded one")
    return parse_shards(parse_object(text, str(path)), path)


def parse_shards(content: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The files that the list at ``path`` names, with their checksums.

    Raises:
        CorruptFileError: if it lists none, or what is no rank's file.
    """
    files = content.get("files")
    if not isinstance(files, dict) or not files:
        raise CorruptFileError(f"{path}: lists no files")
    for name, checksum in files.items():
        if not re.fullmatch(r"rank-\d+-of-\d+\.safetensors", name) or not isinstance(checksum, str):
            raise CorruptFileError(f"{path}: lists {name!r}, which is no rank's file")
    return files


def shares(path: Path, sharding: Sharding, header: Mapping[str, Any]) -> bool:
    """Whether the snapshot at ``path`` has a file that holds just what this rank keeps now."""
    own = path / shard_file(sharding.ranks.rank, sharding.ranks.size)
    if not own.is_file():
        return False
    found = read_header(own)
    pieces = _to_json(sharding, header)
    return found.metadata.get("pieces") == pieces and not difference(found.entries, header)


@dataclass(frozen=True)
class Source:
    """A file, which part of each tensor it has, and its SHA-256, or what that begins with."""

    path: Path
    checksum: str
    pieces: Mapping[str, Piece]


def gather_shards(path: Path, checksum: str, wanted: Mapping[str, Piece], out: Mapping[str, Tensor]) -> None:
    """Fills ``out`` with parts of tensors, from the files of a snapshot that was shared out otherwise.

    What has to be read from where is worked out by ``torch.distributed.checkpoint``.

    Args:
        path: of the snapshot, a file or a folder.
        checksum: of the file, or of the list in the folder.
        wanted: which part of each tensor.
        out: what is filled, contiguous.

    Raises:
        CorruptFileError: if a file that is read is not what was written, or an element is in none.
        OSError: if one is missing or unreadable.
    """
    gather(path, list(_sources(path, checksum)), wanted, out)


def gather(
    path: Path, sources: Sequence[Source], wanted: Mapping[str, Piece], out: Mapping[str, Tensor]
) -> None:
    """The same from files that are known already.

    Args:
        path: that they belong to, for messages.
        sources: the files.
        wanted: which part of each tensor.
        out: what is filled, contiguous.

    Raises:
        CorruptFileError, OSError: as ``gather_shards``.
    """
    opened: dict[int, dict[str, Tensor]] = {}
    for name, piece in wanted.items():
        filled = 0
        for read in _reads(name, piece, sources):
            if read.source not in opened:
                opened[read.source] = _open(sources[read.source])
            stored = opened[read.source][name]
            read.to.of(_part(out[name], *read.target)).copy_(read.come.of(_part(stored, *read.origin)))
            filled += read.to.numel
        if filled != piece.numel:
            raise CorruptFileError(f"{path}: holds {filled} of {piece.numel} elements of {name!r}")


def _sources(path: Path, checksum: str) -> Iterator[Source]:
    if path.is_file():
        places = read_header(path).places
        yield Source(path, checksum, {place.name: Piece.all_of(place.shape) for place in places})
        return
    for file, expected in listed_shards(path, checksum).items():
        metadata = read_header(path / file).metadata
        try:  # of a file that nothing is read from the checksum is not looked at
            pieces = read_pieces(metadata["pieces"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptFileError(f"{path / file}: does not say what it holds ({error!r})") from None
        yield Source(path / file, expected, pieces)


def _open(source: Source) -> dict[str, Tensor]:
    if not source.checksum or not file_checksum(source.path).startswith(source.checksum):
        raise CorruptFileError(f"{source.path}: the checksum differs from the recorded one")
    return map_safetensors(source.path)[0]


@dataclass(frozen=True)
class _Read:
    """What to copy: box ``come`` of box ``origin`` of a source's piece, to box ``to`` of box ``target``.

    ``origin`` and ``target`` come with where they begin among their pieces' elements.
    """

    source: int
    origin: tuple[int, Box]
    come: Box
    target: tuple[int, Box]
    to: Box


def _reads(name: str, piece: Piece, sources: Sequence[Source]) -> Iterator[_Read]:
    # These take half a second to import, and are only needed here.
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

    own = list(_placed(piece))
    origins = [
        (i, *placed) for i, source in enumerate(sources) for placed in _placed(source.pieces.get(name))
    ]
    wanted, stored = (
        [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)) for *_, box in boxes]
        for boxes in (own, origins)
    )
    known = TensorStorageMetadata(TensorProperties(), torch.Size(piece.whole), stored)
    for item in create_read_items_for_chunk_list(name, known, wanted):
        source, start, box = origins[item.storage_index.index or 0]
        shape = tuple(item.lengths)
        come, to = Box(tuple(item.storage_offsets), shape), Box(tuple(item.dest_offsets), shape)
        yield _Read(source, (start, box), come, own[item.dest_index.index or 0], to)


def _placed(piece: Piece | None) -> Iterator[tuple[int, Box]]:
    """Each box of a piece, with where it begins among the piece's elements."""
    start = 0
    for box in piece.boxes if piece else ():
        yield start, box
        start += box.numel


def _part(elements: Tensor, start: int, box: Box) -> Tensor:
    """A box of a piece, as a view of the piece's elements."""
    return elements.reshape(-1)[start : start + box.numel].view(box.shape)


def _to_json(sharding: Sharding, names: Collection[str]) -> str:
    pieces = ((name, piece) for name, piece in sharding.kept.items() if name in names)
    parts = ({n: [p.whole, p.start, [[b.offset, b.shape] for b in p.boxes]]} for n, p in pieces)
    return f"{{{in_turns(parts, ', ', ': ')}}}"


def read_pieces(text: str) -> dict[str, Piece]:
    """Which part of each tensor a file has, by what its metadata says under ``pieces``.

    Raises:
        ValueError: if it says no such thing.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"expected the parts of tensors by their names, got {text:.100}")
    return {name: _piece(name, entry) for name, entry in content.items()}


def _piece(name: str, entry: Any) -> Piece:
    try:
        whole, start, found = entry
        boxes = tuple(Box(tuple(offset), tuple(shape)) for offset, shape in found)
    except (TypeError, ValueError):
        raise ValueError(
            f"the part of {name!r} is {entry!r:.100}, expected a shape and boxes in it"
        ) from None
    fits = isinstance(whole, list) and all(map(_is_size, whole)) and (start is None or _is_size(start))
    for box in boxes:
        fits = fits and len(whole) == len(box.offset) == len(box.shape)
        fits = fits and all(map(_is_size, (*box.offset, *box.shape)))
        fits = fits and all(o + n <= size for o, n, size in zip(box.offset, box.shape, whole, strict=True))
    if not fits:
        raise ValueError(f"the part of {name!r} is {entry!r:.100}, expected boxes within its shape")
    return Piece(tuple(whole), boxes, start)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
