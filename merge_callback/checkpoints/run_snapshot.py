"""Snapshots of a window: whole, with what the window's folder knows of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from merge_callback.checkpoints.checkpoint import Checkpoint, read_manifest, segment_of
from merge_callback.checkpoints.checksums import Recorded, checksums_of_snapshot
from merge_callback.checkpoints.delta_snapshot import decode_snapshot
from merge_callback.checkpoints.file_names import CONFIG, GENERATION_CONFIG, SHARDS
from merge_callback.checkpoints.frozen_part import with_frozen_part
from merge_callback.checkpoints.merge_record import MergeRecord
from merge_callback.checkpoints.reader import OpenOptions, Reader
from merge_callback.checkpoints.stored_snapshot import open_sharded
from merge_callback.checks import DTYPES
from merge_callback.snapshots.files import CorruptFileError

_DTYPES = {str(dtype): dtype for dtype in DTYPES.values()}
_CONFIGURATIONS = {CONFIG, GENERATION_CONFIG}


class ShardedSnapshotReader(Reader):
    """Reads the folder of a snapshot that several ranks kept."""

    name = "sharded-snapshot"

    def matches(self, path: Path) -> bool:
        """Whether it has the list of the ranks' files."""
        return (path / SHARDS).is_file()

    def open(self, path: Path, options: OpenOptions) -> Checkpoint:
        """The tensors, put together in a temporary file under the spool; every file is verified."""
        return complete_snapshot(open_sharded(path, options.spool), options.spool)

    def checksums(self, checkpoint: Checkpoint) -> Sequence[Recorded]:
        """What the list of all ranks' files says, and the manifest of that list."""
        return checksums_of_snapshot(checkpoint.files)


def complete_snapshot(stored: Checkpoint, spool: Path | None = None) -> Checkpoint:
    """A snapshot that is no difference to another one, has all its tensors, and says how its run publishes.

    Args:
        stored: as its own files have it.
        spool: where what does not lie in one file is put together.

    Raises:
        CorruptFileError: if a file that it needs is not what was written, or the manifest is not sound.
        OSError: if one is missing or unreadable, or the spool is full.
    """
    decoded = stored if stored.difference_to is None else decode_snapshot(stored, spool)
    return as_published(with_frozen_part(decoded, spool) if decoded.frozen else decoded)


def as_published(snapshot: Checkpoint) -> Checkpoint:
    """A snapshot with what its run's emissions have beside the weights, if it lies in its window's folder.

    Raises:
        CorruptFileError: if the manifest contradicts the snapshot, or is none that a run has written.
    """
    file = snapshot.path.resolve()
    manifest = read_manifest(file.parent)
    path, published = manifest.path, manifest.content.get("published", {})
    if not isinstance(published, dict):
        raise CorruptFileError(f"{path}: 'published' is {published!r:.100}, expected names and their values")
    keys = ("stripped_prefix", "files", "copied", "complex")
    prefix, texts, copied, paired = (published.get(key) for key in keys)
    dtypes = _dtypes(published.get("dtypes", {}))
    names = _are_names(copied) and _are_names(paired)
    if not isinstance(prefix, str | None) or not _are_texts(texts) or not names or dtypes is None:
        raise CorruptFileError(f"{path}: does not say in a known way how merges are published")
    return replace(
        snapshot,
        tensors={**snapshot.tensors, **_complex(path, snapshot.tensors, paired or ())},
        tied=MergeRecord(path, published, {}).tied(snapshot.tensors),
        segment=segment_of(manifest.record_of(file.name)) or snapshot.segment,
        prefix=prefix or "",
        texts=texts or {},
        copied=frozenset(copied or ()),
        dtypes=dtypes,
    )


def _complex(path: Path, tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The complex tensors, which a window keeps as real and imaginary parts.

    Raises:
        CorruptFileError: if one can't be complex.
    """
    try:
        return {name: torch.view_as_complex(tensors[name]) for name in names}
    except (KeyError, RuntimeError) as error:
        raise CorruptFileError(
            f"{path}: a snapshot does not have the complex tensors it should: {error}"
        ) from None


def _dtypes(found: object) -> dict[torch.dtype, torch.dtype] | None:
    if not isinstance(found, dict):
        return None
    pairs = {_DTYPES.get(str(stored)): _DTYPES.get(str(merged)) for stored, merged in found.items()}
    known = {stored: merged for stored, merged in pairs.items() if stored is not None and merged is not None}
    return known if len(known) == len(found) else None


def _are_texts(found: object) -> bool:
    return found is None or (
        isinstance(found, dict)
        and found.keys() <= _CONFIGURATIONS
        and all(isinstance(text, str) for text in found.values())
    )


def _are_names(found: object) -> bool:
    return found is None or (isinstance(found, list) and all(isinstance(name, str) for name in found))
