"""Writes distributed checkpoints, with every version of PyTorch that is supported."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save, save_state_dict
from torch.distributed.checkpoint.storage import StorageWriter


def save_distributed(
    entries: Mapping[str, Any],
    writer: StorageWriter,
    planner: SavePlanner,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Saves entries, tensors or others, by name.

    Args:
        entries: what this rank has.
        writer: knows the folder.
        planner: which parts of the entries are written.
        group: the ranks that write the checkpoint together, all of which call this; ``None``: this process
            alone, whatever others there are.

    Raises:
        CheckpointException: on all ranks, if one could not write its own.
    """
    state = dict(entries)
    if group is not None:
        save(state, storage_writer=writer, planner=planner, process_group=group)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        if "no_dist" in inspect.signature(save).parameters:
            save(state, storage_writer=writer, planner=planner, no_dist=True)
        else:  # torch 2.6, whose `save` would wait for the other ranks
            save_state_dict(state, writer, no_dist=True, planner=planner)
