"""Opening checkpoints of any known format as memory-mapped tensors; nothing in them is run or trusted."""

from __future__ import annotations

from pathlib import Path

from merge_callback.checkpoints.checkpoint import Checkpoint, step_in_name
from merge_callback.checkpoints.checksums import problems
from merge_callback.checkpoints.model_folder import check_whole, folder_step
from merge_callback.checkpoints.other_formats import what_folder
from merge_callback.checkpoints.reader import OpenOptions
from merge_callback.checkpoints.registry import reader_of

__all__ = ["Checkpoint", "is_checkpoint_folder", "open_checkpoint", "recorded_step", "verify"]


def open_checkpoint(
    path: Path, spool: Path | None = None, state_key: str | None = None, dequantise: bool = True
) -> Checkpoint:
    """Opens a checkpoint by what it is.

    A Lightning ``.ckpt`` or other file of ``torch.save``; a safetensors file (a snapshot of the callback's
    window is one), or the folder of a snapshot that several ranks kept; a Hugging Face folder, whole or
    sharded, of safetensors files or of ``pytorch_model.bin``; an emission of the callback; a folder of
    ``torch.distributed.checkpoint``, saved by any number of processes. ``reader`` says how to add a format.

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
        OSError: for a file that is missing or unreadable, or a spool without room.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    if reader := reader_of(path):
        return reader.open(path, OpenOptions(spool, state_key, dequantise))
    if not path.is_dir():
        raise ValueError(f"{path}: neither a file nor a folder")
    check_whole(path)
    raise ValueError(f"{path}: {what_folder(path)}")


def verify(checkpoint: Checkpoint) -> list[str] | None:
    """Compares a checkpoint's files with the checksums recorded for them (an emission's, a snapshot's).

    Returns:
        One line for each file that differs or is gone, or that nothing was recorded for; ``None`` if nothing
        was recorded at all.
    """
    reader = reader_of(checkpoint.path)
    return problems(checkpoint.files, reader.checksums(checkpoint)) if reader else None


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a folder is one checkpoint."""
    return path.is_dir() and reader_of(path) is not None


def recorded_step(path: Path) -> int | None:
    """The optimizer step a checkpoint knows or its name tells, without opening all of it.

    Raises:
        ValueError: for a file that has to be opened for it and can't be.
    """
    if (step := step_in_name(path, by_word=True)) is not None:
        return step
    step, reader, number = None, reader_of(path), step_in_name(path)
    try:
        step = reader.step(path) if reader else folder_step(path)
    except (ValueError, OSError):
        if number is None:
            raise
    return number if step is None else step
