"""A merged model as a Lightning checkpoint, without Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import LIGHTNING_META, MERGED_CKPT
from merge_callback.checkpoints.pytorch_file import load_mapped
from merge_callback.checkpoints.stand_ins import holds_stand_in, without_stand_ins
from merge_callback.messages import warn
from merge_callback.snapshots.safetensors_file import file_checksum, sync

_CARRIED = ("pytorch-lightning_version", "hyper_parameters", "hparams_name", "hparams_type")


def split_dtypes(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """One shard a dtype: ``torch.save`` keeps the memory of a file in one, and refuses two."""
    shards: dict[torch.dtype, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        shards.setdefault(tensor.dtype, {})[name] = tensor
    return list(shards.values())


def write_lightning(
    folder: Path,
    tensors: Mapping[str, Tensor],
    newest: Checkpoint,
    training: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Turns the files of a model into one Lightning checkpoint.

    ``load_from_checkpoint`` and ``trainer.validate(ckpt_path=…)`` load it.

    Args:
        folder: holds the files that ``tensors`` are mapped from; they are removed.
        tensors: by name; those that share memory do so in the checkpoint.
        newest: the last of the merged checkpoints, whose hyperparameters go along.
        training: the state of the training, from which ``trainer.fit(ckpt_path=…)`` goes on.

    Returns:
        The checkpoint's SHA-256, by its name.
    """
    drafts = list(folder.iterdir())
    content = {**(_carried(newest) if training is None else training), "state_dict": dict(tensors)}
    torch.save(content, folder / MERGED_CKPT)
    sync(folder / MERGED_CKPT)
    for draft in drafts:
        draft.unlink()
    sync(folder)  # before a record is there, which does not name them
    return {MERGED_CKPT: file_checksum(folder / MERGED_CKPT)}


def _carried(newest: Checkpoint) -> dict[str, Any]:
    """What a Lightning checkpoint says besides its tensors."""
    content: dict[str, Any] = {"epoch": 0, "global_step": newest.step or 0}
    sharded = newest.format == "dcp" and (newest.path / LIGHTNING_META).exists()
    if newest.format == "lightning" or sharded:
        source = load_mapped(contained(newest.path, LIGHTNING_META) if sharded else newest.path)
        carried = {key: source[key] for key in _CARRIED if key in source}
        if holds_stand_in(carried):
            warn(
                f"{newest.path}: hyperparameters of other classes than Python's are left out of "
                f"{MERGED_CKPT}; give them to load_from_checkpoint, or load this checkpoint and then the "
                "merged weights: load_state_dict(load_merge(output))"
            )
        return {**content, **without_stand_ins(carried)}
    try:
        return {**content, "pytorch-lightning_version": version("lightning")}
    except PackageNotFoundError:
        return {**content, "pytorch-lightning_version": "2.6.0"}
