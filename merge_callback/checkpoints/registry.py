"""The formats that are read, in the order they are asked."""

from __future__ import annotations

from pathlib import Path

from merge_callback.checkpoints.bin_folder import BinFolderReader
from merge_callback.checkpoints.dcp import DistributedReader
from merge_callback.checkpoints.lightning_merge import LightningMergeReader
from merge_callback.checkpoints.pytorch_file import PytorchReader
from merge_callback.checkpoints.reader import Reader
from merge_callback.checkpoints.run_snapshot import ShardedSnapshotReader
from merge_callback.checkpoints.running_average import RunningAverageReader
from merge_callback.checkpoints.safetensors_file import SafetensorsReader
from merge_callback.checkpoints.safetensors_folder import SafetensorsFolderReader

READERS: list[Reader] = [
    DistributedReader(),
    ShardedSnapshotReader(),
    RunningAverageReader(),
    LightningMergeReader(),
    BinFolderReader(),
    SafetensorsFolderReader(),
    SafetensorsReader(),
    PytorchReader(),  # the last: it takes any file, and says what one is that it can't read
]


def register_reader(reader: Reader) -> None:
    """Adds a reader, which is asked before all others.

    Raises:
        ValueError: for a name that another reader has.
    """
    if any(reader.name == other.name for other in READERS):
        raise ValueError(f"a reader named {reader.name!r} is already registered")
    READERS.insert(0, reader)


def reader_of(path: Path) -> Reader | None:
    """The first reader that a file or folder matches."""
    return next((reader for reader in READERS if reader.matches(path)), None)


def run_suffixes() -> frozenset[str]:
    """The endings of the checkpoint files in the folder of a run."""
    return frozenset(suffix for reader in READERS for suffix in reader.suffixes)


def glob_suffixes() -> frozenset[str]:
    """The endings of the checkpoint files among the matches of a glob."""
    return run_suffixes().union(*(reader.glob_suffixes for reader in READERS))
