"""Hugging Face folders of ``pytorch_model.bin``: files of ``torch.save``, whole or with an index."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from merge_callback.checkpoints.checkpoint import Checkpoint, parse_count, step_in_name
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import BIN_INDEX, BIN_WEIGHTS, WEIGHTS
from merge_callback.checkpoints.model_folder import extras, trainer_record
from merge_callback.checkpoints.pytorch_file import open_pytorch
from merge_callback.checkpoints.quantised import with_plain_weights
from merge_callback.checkpoints.reader import OpenOptions, Reader
from merge_callback.checkpoints.shard_index import check_named, read_index
from merge_callback.checkpoints.training_state import without_training_state


class BinFolderReader(Reader):
    """Reads such a folder."""

    name = "bin-folder"

    def matches(self, path: Path) -> bool:
        """Whether its weights are in such files, and not also in safetensors files."""
        if not path.is_dir() or (path / WEIGHTS).exists() or any(path.glob("*.safetensors.index.json")):
            return False
        return (path / BIN_INDEX).exists() or (path / BIN_WEIGHTS).exists()

    def open(self, path: Path, options: OpenOptions) -> Checkpoint:
        """The tensors of all files, as views of memory maps."""
        return with_plain_weights(without_training_state(open_bin_folder(path)), options)


def open_bin_folder(folder: Path) -> Checkpoint:
    """The tensors of all files.

    Raises:
        CorruptFileError: if a file is broken, or index and files disagree, or one leads out of the folder.
        FileNotFoundError: if a file is missing.
        ValueError: if loading a file would run code.
    """
    has_index = (folder / BIN_INDEX).exists()
    files: dict[str, set[str] | None] = read_index(folder, BIN_INDEX) if has_index else {BIN_WEIGHTS: None}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for file, expected in files.items():
        shard = open_pytorch(contained(folder, file))
        check_named(
            folder,
            folder / file,
            expected,
            {**shard.tensors, **{a: shard.tensors[k] for a, k in shard.tied.items()}},
        )
        tensors |= shard.tensors
        tied |= shard.tied
    taken, left_out = extras(folder, {*files, BIN_INDEX})
    record = trainer_record(folder)
    step = parse_count(record.get("step"))
    return Checkpoint(
        path=folder,
        tensors=tensors,
        tied=tied,
        step=step_in_name(folder) if step is None else step,
        tokens=parse_count(record.get("tokens")),
        files=[folder / file for file in files],
        extras=taken,
        left_out=left_out,
        format="pytorch",
    )
