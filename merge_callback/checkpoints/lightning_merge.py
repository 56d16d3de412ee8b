"""A merge that was written for Lightning (``merge --as lightning``): one ``.ckpt`` and its record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import MERGED_CKPT, PROVENANCE
from merge_callback.checkpoints.pytorch_file import open_pytorch
from merge_callback.checkpoints.reader import OpenOptions, Reader


class LightningMergeReader(Reader):
    """Reads such a folder."""

    name = "lightning-merge"

    def matches(self, path: Path) -> bool:
        """Whether it has both files."""
        return (path / PROVENANCE).is_file() and (path / MERGED_CKPT).is_file()

    def open(self, path: Path, options: OpenOptions) -> Checkpoint:
        """The state dict of the file."""
        return replace(open_pytorch(contained(path, MERGED_CKPT)), path=path, format="emission")
