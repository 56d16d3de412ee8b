"""A snapshot that is kept as the difference to the one before (``snapshot_codec=``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from merge_callback.checkpoints.checkpoint import Checkpoint, read_manifest
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.spool import default_spool, map_tensors
from merge_callback.checkpoints.stored_snapshot import open_stored
from merge_callback.reduce import one_pass
from merge_callback.snapshots.layout import delta_unit
from merge_callback.snapshots.safetensors_file import CorruptFileError


def decode_snapshot(checkpoint: Checkpoint, spool: Path | None = None) -> Checkpoint:
    """The whole snapshot, from its file and those before it, summed up in a temporary file under ``spool``.

    Args:
        checkpoint: as it is stored.
        spool: a folder on a disk with room for all weights; default: ``$TMPDIR``, else ``/var/tmp``.

    Raises:
        CorruptFileError: if one it builds on is missing or of another model.
        OSError: if a file can't be read, or the spool is full.
    """
    chain = [checkpoint]
    while (step := chain[0].difference_to) is not None:
        chain.insert(0, _of_step(step, chain[0], spool))
    wide = {
        name: (first.dtype, first.shape)
        for name, first in chain[0].tensors.items()
        if name in checkpoint.tensors and checkpoint.tensors[name].dtype != first.dtype
    }
    summed = map_tensors(spool or default_spool(), wide)
    for name, out in summed.items():
        stored = [_part(name, out, stage) for stage in chain]
        units = [delta_unit(part.dtype) if part.dtype != out.dtype else 1.0 for part in stored]
        one_pass(stored, units, out.view(-1))
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, **summed},
        files=[file for stage in reversed(chain) for file in stage.files],
        difference_to=None,
    )


def _of_step(step: int, after: Checkpoint, spool: Path | None) -> Checkpoint:
    """The snapshot of ``step`` that another one in the same window's folder is the difference to."""
    for path in _candidates(step, after.path):
        earlier = open_stored(path, spool)
        if earlier.step == step and (earlier.difference_to is None or earlier.difference_to < step):
            return earlier
    raise CorruptFileError(
        f"{after.path}: is kept as the difference to the snapshot of step {step}, which is not in "
        f"{after.path.parent}; take an emission, or a snapshot that the window still holds"
    )


def _candidates(step: int, path: Path) -> Iterator[Path]:
    """What the window, or that of a checkpoint, lists of a step; of others the only one there is."""
    folder = path.resolve().parent
    manifest = read_manifest(folder)
    listed = [str(record.get("file")) for record in manifest.snapshots]
    for files in (listed, *manifest.saved):
        earlier = [file for file in files if file.startswith(f"step={step:08d}-")]
        if path.resolve().name in files and earlier:
            yield contained(folder, earlier[0])
            return
    found = sorted(folder.glob(f"step={step:08d}-*"))
    if len(found) > 1:
        raise CorruptFileError(
            f"{path}: builds on step {step}, of which {folder} holds {len(found)}; which is not known"
        )
    yield from found


def _part(name: str, out: Tensor, stage: Checkpoint) -> Tensor:
    if name not in stage.tensors or stage.tensors[name].shape != out.shape:
        raise CorruptFileError(
            f"{stage.path}: {name!r} is missing, or has another shape than the snapshots before"
        )
    return stage.tensors[name].view(-1)
