"""What the manifest of a window says of all its snapshots: how their run publishes a merge of them."""

from __future__ import annotations

from dataclasses import replace

from merge_callback.checkpoints.checkpoint import Checkpoint, read_manifest, segment_of
from merge_callback.checkpoints.file_names import CONFIG, GENERATION_CONFIG
from merge_callback.checkpoints.merge_record import MergeRecord
from merge_callback.snapshots.files import CorruptFileError

_CONFIGURATIONS = {CONFIG, GENERATION_CONFIG}


def as_published(snapshot: Checkpoint) -> Checkpoint:
    """A snapshot with what its run's emissions have beside the weights, where it lies in its window's folder.

    Raises:
        CorruptFileError: where the manifest contradicts the snapshot, or is none that a run has written.
    """
    file = snapshot.path.resolve()
    manifest = read_manifest(file.parent)
    path, published = manifest.path, manifest.content.get("published", {})
    if not isinstance(published, dict):
        raise CorruptFileError(f"{path}: 'published' is {published!r:.100}, expected names and their values")
    prefix, texts, copied = (published.get(key) for key in ("stripped_prefix", "files", "copied"))
    if not isinstance(prefix, str | None) or not _are_texts(texts) or not _are_names(copied):
        raise CorruptFileError(f"{path}: does not say in a known way how merges are published")
    return replace(
        snapshot,
        tied=MergeRecord(path, published, {}).tied(snapshot.tensors),
        segment=segment_of(manifest.record_of(file.name)) or snapshot.segment,
        prefix=prefix or "",
        texts=texts or {},
        copied=frozenset(copied or ()),
    )


def _are_texts(found: object) -> bool:
    return found is None or (
        isinstance(found, dict)
        and found.keys() <= _CONFIGURATIONS
        and all(isinstance(text, str) for text in found.values())
    )


def _are_names(found: object) -> bool:
    return found is None or (isinstance(found, list) and all(isinstance(name, str) for name in found))
