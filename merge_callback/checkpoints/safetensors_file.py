"""Single safetensors files; a snapshot of a window is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from merge_callback.checkpoints.checkpoint import Checkpoint, parse_count, step_in_name
from merge_callback.checkpoints.checksums import Recorded, checksums_of_snapshot
from merge_callback.checkpoints.model_folder import step_beside
from merge_callback.checkpoints.quantised import with_plain_weights
from merge_callback.checkpoints.reader import OpenOptions, Reader
from merge_callback.checkpoints.run_snapshot import complete_snapshot
from merge_callback.checkpoints.state_key import under_key
from merge_callback.checkpoints.stored_snapshot import check_whole_model, is_snapshot, snapshot_in_file
from merge_callback.checkpoints.training_state import without_training_state
from merge_callback.snapshots.mapped_tensors import map_safetensors


class SafetensorsReader(Reader):
    """Reads a safetensors file, whoever wrote it."""

    name = "safetensors"
    suffixes = (".safetensors",)

    def matches(self, path: Path) -> bool:
        """Whether it is called so."""
        return path.suffix == ".safetensors" and path.is_file()

    def open(self, path: Path, options: OpenOptions) -> Checkpoint:
        """The tensors, as views of a memory map; of a snapshot all that it is made up of."""
        stored = _open(path)
        if stored.format == "snapshot":
            return complete_snapshot(stored, options.spool)
        return with_plain_weights(without_training_state(under_key(stored, options.state_key)), options)

    def step(self, path: Path) -> int | None:
        """What the records of its folder's model tell, if it is that model; else its metadata."""
        beside = step_beside(path)
        return _open(path).step if beside is None else beside

    def checksums(self, checkpoint: Checkpoint) -> Sequence[Recorded]:
        """What the manifest says of a snapshot, or else its very name."""
        return checksums_of_snapshot(checkpoint.files) if checkpoint.format == "snapshot" else ()


def aliases(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Shared names, as ``safetensors.torch.save_model`` notes them: among all else the metadata may say."""
    return {
        alias: kept
        for alias, kept in metadata.items()
        if kept in tensors and alias not in tensors and alias != "format"
    }


def _open(path: Path) -> Checkpoint:
    tensors, metadata = map_safetensors(path)
    if is_snapshot(metadata):
        return snapshot_in_file(path, tensors, metadata)
    check_whole_model(path, metadata)
    step = parse_count(metadata.get("step"))
    return Checkpoint(
        path=path,
        tensors=tensors,
        tied=aliases(tensors, metadata),
        step=step_in_name(path) if step is None else step,
        tokens=parse_count(metadata.get("tokens")),
        files=[path],
        format="safetensors",
    )
