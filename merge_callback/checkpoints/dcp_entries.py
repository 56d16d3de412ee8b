"""All that a distributed checkpoint holds, entry by entry; weights are read by ``dcp_tensors``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.dcp_metadata import read_metadata
from merge_callback.checkpoints.dcp_tensors import check_entries, fill
from merge_callback.checkpoints.file_names import METADATA
from merge_callback.checkpoints.pytorch_file import short_reasons
from merge_callback.snapshots.files import CorruptFileError, open_regular


class DistributedEntries:
    """The entries of one checkpoint, each read when it is asked for.

    Args:
        folder: with ``.metadata`` in it.

    Raises:
        ValueError: if ``.metadata`` would run code.
        OSError: if it can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(contained(folder, METADATA))
        entries = self._metadata.state_dict_metadata.items()
        self.tensors = {str(name): e for name, e in entries if isinstance(e, TensorStorageMetadata)}
        self._objects = [str(name) for name, e in entries if isinstance(e, BytesStorageMetadata)]

    @property
    def paths(self) -> Any:
        """The keys of nested state that lead to each entry, as ``.metadata`` has them."""
        return self._metadata.planner_data

    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory.

        Raises:
            CorruptFileError: if its parts do not make it up.
            OSError: if a file can't be read.
        """
        entry = self.tensors[name]
        check_entries(self.folder, self._metadata, {name: entry})
        read = torch.empty(entry.size, dtype=entry.properties.dtype)
        fill(self.folder, self._metadata, {name: entry}, {name: read})
        return read

    def objects(self) -> dict[str, Any]:
        """What is no tensor, by name: numbers, text and the like.

        Raises:
            ValueError: for an object that can't be loaded without running code.
            OSError: if a file can't be read.
        """
        return {name: self._object(name) for name in self._objects}

    def _object(self, name: str) -> Any:
        place = self._metadata.storage_data.get(MetadataIndex(name))
        if place is None:
            raise CorruptFileError(f"{self.folder}: no file is known to hold {name!r}")
        with open_regular(contained(self.folder, place.relative_path)) as file:
            file.seek(place.offset)
            content = file.read(place.length)
        try:
            with short_reasons():
                return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # a broken pickle raises anything
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self.folder}: {name!r} is nothing that is loaded without running code ({reason:.120})"
            ) from None


def state_names(entries: DistributedEntries, weights: Sequence[str]) -> tuple[str, list[str]]:
    """What comes before the names of the weights, and the names of all other tensors.

    Args:
        entries: of the checkpoint.
        weights: the names that a reader has given the weights.
    """
    first = weights[0]
    for name in entries.tensors:
        place = name.removesuffix(first)
        if name.endswith(first) and all(place + weight in entries.tensors for weight in weights):
            own = {place + weight for weight in weights}
            return place, [other for other in entries.tensors if other not in own]
    raise CorruptFileError(f"{entries.folder}: {first!r} is not found in it again")
