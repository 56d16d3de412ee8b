"""A merge written by all ranks at once, in the format of ``torch.distributed.checkpoint``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from merge_callback.checkpoints.dcp_save import save_distributed
from merge_callback.sharding import Piece, Ranks
from merge_callback.sharding.pieces import Box
from merge_callback.snapshots.safetensors_file import file_checksum


def write_distributed(
    folder: Path, parts: Mapping[str, Tensor], pieces: Mapping[str, Piece], ranks: Ranks
) -> dict[str, str]:
    """Writes what each rank keeps into one folder, durably. To be called on all ranks.

    Args:
        folder: there, for all of them.
        parts: of tensors, by name.
        pieces: which part of the whole each of them is.
        ranks: who keep all of it between them.

    Returns:
        The SHA-256 of every rank's file.

    Raises:
        CheckpointException: on all ranks, if one could not write its own.
    """
    writer = _Writer(folder, sync_files=True)
    save_distributed(parts, writer, _Planner(pieces, ranks.is_first), ranks.group)
    own = {path.name: file_checksum(path) for path in folder.glob(f"__{ranks.rank}_*.distcp")}
    return {name: checksum for theirs in ranks.exchange(own) for name, checksum in theirs.items()}


class _Writer(FileSystemWriter):
    """Writes the same bytes for the same merge: so one that a resumed run makes again is known by them."""

    def storage_meta(self) -> None:
        """Is a random id otherwise, and the folder, which is a draft's."""


class _Planner(DefaultSavePlanner):
    """Plans one item a box; everything else is as for any other model."""

    def __init__(self, pieces: Mapping[str, Piece], is_first: bool) -> None:
        super().__init__(flatten_state_dict=False)
        self._pieces, self._is_first = pieces, is_first
        self._boxes: dict[MetadataIndex, Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, piece in self._pieces.items():
            start, flat = 0, self.state_dict[name].reshape(-1)
            empty = [Box((0,) * len(piece.whole), piece.whole)] if self._is_first else []
            for box in piece.boxes if math.prod(piece.whole) else empty:
                offset, shape = torch.Size(box.offset), torch.Size(box.shape)
                index = MetadataIndex(name, offset)
                data = TensorWriteData(
                    ChunkStorageMetadata(offset, shape), TensorProperties(flat.dtype), torch.Size(piece.whole)
                )
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                self._boxes[index] = flat[start : start + box.numel].view(shape)
                start += box.numel
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._boxes[write_item.index]
