"""What a reader of one format of checkpoints has to offer.

A new format is one file in this folder with a subclass of ``Reader``, and a line in ``registry.READERS``;
or a call of ``registry.register_reader`` from anywhere, as in a module that ``merge --import`` names::

    class NpzReader(Reader):
        name = "npz"
        suffixes = (".npz",)

        def matches(self, path: Path) -> bool:
            return path.is_file() and path.suffix == ".npz"

        def open(self, path: Path, options: OpenOptions) -> Checkpoint:
            with numpy.load(path) as arrays:  # allow_pickle=False: nothing in a checkpoint is run
                tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
            return Checkpoint(path, tensors, tied={}, step=step_in_name(path), files=[path], format=self.name)

    register_reader(NpzReader())

That is enough for ``open_checkpoint`` and every command. ``spool.map_tensors`` has room on disk for a
format whose tensors can't be mapped from its files; ``training_state`` and ``quantised`` have what is left to
do for formats that may hold more than a model's weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.checkpoints.checksums import Recorded, checksums_of_merge
from merge_callback.checkpoints.model_folder import folder_step


@dataclass(frozen=True)
class OpenOptions:
    """How a checkpoint is to be opened; see ``open_checkpoint``."""

    spool: Path | None = None
    state_key: str | None = None
    dequantise: bool = True


class Reader(ABC):
    """Reads one format. It runs no code from a checkpoint and believes nothing in it."""

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    """The endings of its files in the folder of a run; empty for a format of folders."""

    glob_suffixes: ClassVar[tuple[str, ...]] = ()
    """Further endings, of files that are checkpoints only if a glob names them."""

    @abstractmethod
    def matches(self, path: Path) -> bool:
        """Whether a file or folder is of this format, as far as names tell; the first to say so reads it."""

    @abstractmethod
    def open(self, path: Path, options: OpenOptions) -> Checkpoint:
        """Opens a checkpoint that matches.

        Raises:
            ValueError: for what can't be opened without running code or guessing; ``CorruptFileError`` for
                what is cut, altered or contradicts itself.
            OSError: for a file that is missing or unreadable, or a spool without room.
        """

    def step(self, path: Path) -> int | None:
        """The optimizer step that a checkpoint knows, if that is told without opening all of it."""
        return folder_step(path)

    def checksums(self, checkpoint: Checkpoint) -> Sequence[Recorded]:
        """The checksums that were recorded of an opened checkpoint's files; none if nothing was."""
        return checksums_of_merge(checkpoint.path)
