"""The state of a training in distributed checkpoints, its moments merged, and a checkpoint to resume from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.dcp_entries import DistributedEntries, state_names
from merge_callback.checkpoints.dcp_save import save_distributed
from merge_callback.checkpoints.file_names import LIGHTNING_META
from merge_callback.checkpoints.spool import map_tensors
from merge_callback.offline.file_merge import FileMerge
from merge_callback.offline.optimizer_states import MOMENTS, weights_of_moments
from merge_callback.reduce import one_pass
from merge_callback.snapshots.arena import all_finite
from merge_callback.snapshots.files import copy_file, sync
from merge_callback.snapshots.safetensors_file import file_checksum


@torch.no_grad()
def resumable_distributed(merge: FileMerge, spool: Path) -> tuple[str, dict[str, Any]]:
    """All that the newest distributed checkpoint holds besides the merged weights, its moments merged.

    Args:
        merge: of distributed checkpoints.
        spool: a folder on a disk with room for the moments.

    Returns:
        What comes before the names of the weights there, and the entries by name.

    Raises:
        ValueError: if there are no moments, or others than in the newest; the entry is named.
        OSError: if a file can't be read, or the spool has no room.
    """
    weights = weights_of_moments(merge)
    sources = [DistributedEntries(checkpoint.path) for checkpoint in merge.checkpoints]
    newest = sources[-1]
    place, others = state_names(newest, list(merge.newest.tensors))
    moments = [name for name in others if name.rpartition(".")[2] in MOMENTS]
    if not moments:
        raise ValueError(f"--optimizer-state: {newest.folder} holds no moments ({', '.join(MOMENTS)})")
    for name in others:
        entry = newest.tensors[name]
        if ".state." in name and name not in moments and entry.size.numel() > 1:
            raise ValueError(
                f"--optimizer-state: {name!r} is no moment that has a mean: {', '.join(MOMENTS)}"
            )
    entries = {n: (newest.tensors[n].properties.dtype, newest.tensors[n].size) for n in others}
    room: dict[str, Any] = map_tensors(spool, entries)
    for name in others:
        if name not in moments:
            room[name].copy_(newest.tensor(name))
            continue
        tensors = [_moment(source, name, newest) for source in sources]
        one_pass([tensor.reshape(-1) for tensor in tensors], weights, room[name].reshape(-1))
    return place, {**room, **newest.objects()}


def _moment(source: DistributedEntries, name: str, newest: DistributedEntries) -> Tensor:
    if name not in source.tensors or source.tensors[name].size != newest.tensors[name].size:
        raise ValueError(f"--optimizer-state: {source.folder} has no {name!r} like that of {newest.folder}")
    if not all_finite(tensor := source.tensor(name)):
        raise ValueError(f"--optimizer-state: {name!r} holds NaN or Inf in {source.folder}")
    return tensor


class _Planner(DefaultSavePlanner):
    """Plans flat entries, and notes of which nested state they are."""

    def __init__(self, paths: Any) -> None:
        super().__init__(flatten_state_dict=False)
        self._paths = paths

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """As always, with the keys that lead to each entry."""
        plans, metadata = super().create_global_plan(all_plans)
        return plans, replace(metadata, planner_data=self._paths)


def write_resumable(
    folder: Path, weights: Mapping[str, Tensor], place: str, entries: Mapping[str, Any], newest: Path
) -> dict[str, str]:
    """Turns the files of a model into a distributed checkpoint from which training goes on.

    Args:
        folder: holds the files that ``weights`` are mapped from; they are removed.
        weights: the merged ones.
        place: what comes before their names.
        entries: all else.
        newest: the last of the merged checkpoints; Lightning's part of it goes along.

    Returns:
        The SHA-256 of every file.
    """
    drafts = list(folder.iterdir())
    state = {place + name: tensor for name, tensor in weights.items()}
    writer = FileSystemWriter(folder, sync_files=True)
    save_distributed({**state, **entries}, writer, _Planner(DistributedEntries(newest).paths))
    if (newest / LIGHTNING_META).is_file():
        copy_file(contained(newest, LIGHTNING_META), folder / LIGHTNING_META)
    for draft in drafts:
        draft.unlink()
    sync(folder)  # before a record is there, which does not name them
    return {path.name: file_checksum(path) for path in sorted(folder.iterdir())}
