"""Opening checkpoints of any known format as memory-mapped tensors; nothing in them is run or trusted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from merge_callback.checkpoints.bin_folder import is_bin_folder, open_bin_folder
from merge_callback.checkpoints.checkpoint import Checkpoint, step_in_name
from merge_callback.checkpoints.checksums import failed_checksums
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.delta_snapshot import decode_snapshot
from merge_callback.checkpoints.file_names import (
    INDEX,
    MERGED_CKPT,
    METADATA,
    PROVENANCE,
    SHARDS,
    WEIGHTS,
    WEIGHTS_ALONE,
)
from merge_callback.checkpoints.frozen_part import with_frozen_part
from merge_callback.checkpoints.merge_record import read_record
from merge_callback.checkpoints.pytorch_file import load_mapped, open_pytorch
from merge_callback.checkpoints.quantised import with_plain_weights
from merge_callback.checkpoints.run_snapshot import as_published
from merge_callback.checkpoints.safetensors_folder import open_file, open_folder, other_weights
from merge_callback.checkpoints.safetensors_folder import recorded_step as _folder_step
from merge_callback.checkpoints.state_key import under_key
from merge_callback.checkpoints.training_state import without_training_state

__all__ = ["Checkpoint", "is_checkpoint_folder", "open_checkpoint", "recorded_step", "verify"]


def open_checkpoint(
    path: Path, spool: Path | None = None, state_key: str | None = None, dequantise: bool = True
) -> Checkpoint:
    """Opens a checkpoint by what it is.

    A Lightning ``.ckpt`` or other file of ``torch.save``; a safetensors file (a snapshot of the callback's
    window is one), or the folder of a snapshot that several ranks kept; a Hugging Face folder, whole or
    sharded, of safetensors files or of ``pytorch_model.bin``; an emission of the callback; a folder of
    ``torch.distributed.checkpoint``, saved by any number of processes.

    Training state beside the weights is left out; eight-bit codes are multiplied with their scales.

    Args:
        path: the file or folder; a symlink is followed.
        spool: where a distributed checkpoint is put together: a folder on a disk with room for its weights.
        state_key: the entry of a ``torch.save`` file that holds the weights, ``"state.model"`` for one within
            another, if it isn't the only one; of other files, what comes before the names of the weights.

        dequantise: multiply codes with their scales, and refuse what can't be; otherwise both are as stored.

    Raises:
        ValueError: for what can't be opened without running code or guessing; ``CorruptFileError`` for what
            is cut, altered or contradicts itself.
        OSError: where a file is missing or unreadable, or the spool has no room.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    stored = _open_stored(path, spool, state_key)
    if state_key is not None and stored.format in ("safetensors", "dcp"):
        stored = under_key(stored, state_key)
    if stored.difference_to is not None:
        stored = decode_snapshot(stored, lambda earlier: _open_stored(earlier, spool, None), spool)
    if stored.format in ("pytorch", "safetensors"):  # a LightningModule's state is what the module says it is
        stored = without_training_state(stored)
    if dequantise and stored.format in ("pytorch", "safetensors", "dcp", "lightning"):
        stored = with_plain_weights(stored, spool)
    stored = with_frozen_part(stored, spool) if stored.frozen else stored
    return as_published(stored) if stored.format == "snapshot" else stored


def _open_stored(path: Path, spool: Path | None, state_key: str | None) -> Checkpoint:
    """A checkpoint as its own files have it."""
    if (path / METADATA).is_file():
        from merge_callback.checkpoints.dcp import open_dcp

        stored = open_dcp(path, spool)
        tied = read_record(path).tied(stored.tensors) if (path / PROVENANCE).exists() else {}
        return replace(stored, tied=tied)
    if (path / SHARDS).is_file():
        from merge_callback.checkpoints.sharded_snapshot import open_sharded_snapshot

        return open_sharded_snapshot(path, spool)
    if (path / PROVENANCE).is_file() and (path / MERGED_CKPT).is_file():
        stored = open_pytorch(contained(path, MERGED_CKPT))
        return replace(stored, path=path, format="emission")
    if path.is_dir():
        return open_bin_folder(path) if is_bin_folder(path) else open_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: neither a file nor a folder")
    return open_file(path) if path.suffix == ".safetensors" else open_pytorch(path, state_key)


def verify(checkpoint: Checkpoint) -> list[str] | None:
    """Compares a checkpoint's files with the checksums recorded for them (an emission's, a snapshot's).

    Returns:
        One line for each file that differs or is gone; ``None`` where nothing was recorded.
    """
    return failed_checksums(checkpoint)


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a folder is one checkpoint."""
    return path.is_dir() and (
        any((path / name).exists() for name in (METADATA, SHARDS, PROVENANCE, WEIGHTS, INDEX))
        or is_bin_folder(path)
        or any(path.glob("*.safetensors.index*.json"))
        or bool(other_weights(path))
    )


def recorded_step(path: Path) -> int | None:
    """The optimizer step a checkpoint knows or its name tells, without opening all of it.

    Raises:
        ValueError: where a file has to be opened for it and can't be.
    """
    step = step_in_name(path)
    if step is not None:
        return step
    if (path / METADATA).is_file():
        from merge_callback.checkpoints.dcp import recorded_step as dcp_step

        return dcp_step(path)
    if path.is_dir():
        return _folder_step(path)
    if path.stem in WEIGHTS_ALONE and (step := _folder_step(path.parent)) is not None:
        return step
    if path.suffix == ".safetensors":
        return open_file(path).step
    content = load_mapped(path)
    return next((content[k] for k in ("global_step", "step") if isinstance(content.get(k), int)), None)
