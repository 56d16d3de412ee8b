"""Folders of safetensors files: Hugging Face's, and our emissions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from merge_callback.checkpoints.checkpoint import Checkpoint, parse_count, segment_of, step_in_name
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, PROVENANCE, WEIGHTS
from merge_callback.checkpoints.merge_record import read_record
from merge_callback.checkpoints.model_folder import check_whole, extras, folder_step, trainer_record
from merge_callback.checkpoints.other_formats import what_folder
from merge_callback.checkpoints.quantised import with_plain_weights
from merge_callback.checkpoints.reader import OpenOptions, Reader
from merge_callback.checkpoints.safetensors_file import aliases
from merge_callback.checkpoints.shard_index import check_named, read_index
from merge_callback.checkpoints.state_key import under_key
from merge_callback.checkpoints.training_state import without_training_state
from merge_callback.snapshots.mapped_tensors import map_safetensors

_INDICES = "*.safetensors.index*.json"
_OTHER = re.compile(
    r"(model|diffusion_pytorch_model|adapter_model)(\.\w+)?\.safetensors(\.index(\.\w+)?\.json)?"
)
"""Names that libraries give a model's only weights, in a variant such as ``fp16``; or the index of them."""


class SafetensorsFolderReader(Reader):
    """Reads Hugging Face's folders of safetensors files; our emissions are such.

    The file of an adapter's weights stands for its folder: they mean nothing without the configuration.
    """

    name = "safetensors-folder"

    def matches(self, path: Path) -> bool:
        """Whether it has weights, or an index, by a name that libraries give them, or a merge's record."""
        if path.name == ADAPTER_WEIGHTS:
            return path.is_file() and (path.parent / ADAPTER_CONFIG).exists()
        return path.is_dir() and (
            any((path / name).exists() for name in (WEIGHTS, INDEX, PROVENANCE))
            or any(path.glob(_INDICES))
            or bool(other_weights(path))
        )

    def open(self, path: Path, options: OpenOptions) -> Checkpoint:
        """The tensors of all files, as views of memory maps; of an emission as they are."""
        stored = open_folder(path.parent, path.name) if path.is_file() else open_folder(path)
        if stored.format == "emission":
            return stored
        return with_plain_weights(without_training_state(under_key(stored, options.state_key)), options)

    def step(self, path: Path) -> int | None:
        """What the records in the folder tell."""
        return folder_step(path.parent if path.is_file() else path)


def open_folder(folder: Path, file: str = "") -> Checkpoint:
    """A folder with ``model.safetensors``, or with shards and an index; an emission if it has ``merge.json``.

    Args:
        folder: with what lies beside the weights.
        file: of the weights in it, if it is not the folder that tells.

    Raises:
        CorruptFileError: if a file is broken, or index and files disagree, or one leads out of the folder.
        FileNotFoundError: if a file is missing.
        ValueError: if the folder has both, or neither.
    """
    check_whole(folder)
    files, index = ({file: None}, "") if file else weight_files(folder)
    merge = read_record(folder) if (folder / PROVENANCE).exists() else None
    record = merge.content if merge else trainer_record(folder)
    step = parse_count(record.get("step"))
    tensors, shared, shards = _read_shards(folder, files)
    taken, left_out = extras(folder, {*files, index})
    return Checkpoint(
        path=folder,
        tensors=tensors,
        tied=merge.tied(tensors) if merge and not file else shared,
        step=step_in_name(folder) if step is None else step,
        tokens=parse_count(record.get("tokens")),
        files=[folder / file for file in files],
        extras=taken,
        format="emission" if merge else "safetensors",
        segment=segment_of(record),
        shards=shards,
        index=index,
        left_out=left_out,
    )


def weight_files(folder: Path) -> tuple[Mapping[str, set[str] | None], str]:
    """The files a folder's weights are in, each with the names an index gives it (``None``: no index).

    And the name of that index, which is empty if there is none. ``model.safetensors`` and its index go
    before what other libraries call a model's weights, and those before a variant of the same.

    Raises:
        CorruptFileError: if the index is broken.
        ValueError: if it is not clear which files, or there are none.
    """
    indices = sorted(path.name for path in folder.glob(_INDICES))
    single = (folder / WEIGHTS).exists()
    if not single and INDEX not in indices and (others := other_weights(folder)):
        if len(others) > 1:
            raise ValueError(f"{folder}: has {', '.join(others)}; move away all but one, or give a file")
        index = others[0] if others[0].endswith(".json") else ""
        return read_index(folder, index) if index else {others[0]: None}, index
    if INDEX in indices or (len(indices) == 1 and not single):
        index = INDEX if INDEX in indices else indices[0]
        files = read_index(folder, index)
        if single and WEIGHTS not in files:
            raise ValueError(
                f"{folder}: has both {WEIGHTS} and {INDEX}, of other files; remove the one left over"
            )
        return files, index
    if single:
        return {WEIGHTS: None}, ""
    if indices:
        raise ValueError(
            f"{folder}: has several indices ({', '.join(indices)}), none of them {INDEX}; "
            "move the others away"
        )
    raise ValueError(f"{folder}: {what_folder(folder)}")


def other_weights(folder: Path) -> list[str]:
    """The weights, or the index of them, that another library than transformers names so; variants last.

    One, or several that are all variants; none if there are no such names.
    """
    found = [match for path in sorted(folder.iterdir()) if (match := _OTHER.fullmatch(path.name))]
    return [m[0] for m in found if not m[2] and not m[4]] or [m[0] for m in found]


def _read_shards(
    folder: Path, files: Mapping[str, set[str] | None]
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, list[str]]]:
    """The tensors of all files, further names of shared ones, and which file has which."""
    tensors: dict[str, Tensor] = {}
    shards: dict[str, list[str]] = {}
    shared: dict[str, str] = {}
    for file, expected in files.items():
        path = contained(folder, file)
        found, metadata = map_safetensors(path)
        check_named(folder, path, expected, found)
        shards[file] = [name for name in found if name not in tensors]
        tensors |= found
        shared |= aliases(found, metadata)
    return tensors, {alias: kept for alias, kept in shared.items() if alias not in tensors}, shards
