"""Folders of ``torch.distributed.checkpoint``, a merge that was published as one included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from merge_callback.checkpoints.checkpoint import Checkpoint, parse_count, step_in_name
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import LIGHTNING_META, METADATA, PROVENANCE
from merge_callback.checkpoints.merge_record import read_record
from merge_callback.checkpoints.pytorch_file import load_mapped
from merge_callback.checkpoints.quantised import with_plain_weights
from merge_callback.checkpoints.reader import OpenOptions, Reader
from merge_callback.checkpoints.state_key import under_key


class DistributedReader(Reader):
    """Reads a folder with a ``.metadata`` file, whatever number of processes wrote it."""

    name = "dcp"

    def matches(self, path: Path) -> bool:
        """Whether it has that file."""
        return (path / METADATA).is_file()

    def open(self, path: Path, options: OpenOptions) -> Checkpoint:
        """The tensors, put together in a temporary file under the spool; without the keys of nested state
        that lead to all of them.
        """
        from merge_callback.checkpoints.dcp_tensors import read_dcp  # takes 0.7 s to import

        found = read_dcp(path, options.spool)
        tensors, files = found.tensors, found.files
        stored = Checkpoint(
            path, tensors, {}, step=self.step(path), files=files, format="dcp", training_state=found.left_out
        )
        if (path / PROVENANCE).exists():
            stored = replace(stored, tied=read_record(path).tied(tensors))
        key = options.state_key if options.state_key is not None else found.place or None
        return with_plain_weights(under_key(stored, key), options)

    def step(self, path: Path) -> int | None:
        """The step in Lightning's part of a sharded checkpoint, if safely read; else in the folder's name."""
        try:
            step = parse_count(load_mapped(contained(path, LIGHTNING_META))["global_step"])
        except Exception:  # whatever a foreign pickle does wrong: a step is good to have, no more
            step = None
        return step_in_name(path) if step is None else step
