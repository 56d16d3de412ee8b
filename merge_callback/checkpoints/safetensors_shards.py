"""How a model's tensors are shared out over safetensors files (Hugging Face's scheme)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from merge_callback.checkpoints.file_names import INDEX
from merge_callback.snapshots.files import write_json


def split_shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Shards of at most ``max_bytes`` (or one tensor), wider dtypes first so that all stay aligned."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name in sorted(tensors, key=lambda n: -tensors[n].itemsize):
        if shards[-1] and size + tensors[name].nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name]
        size += tensors[name].nbytes
    return shards


def shard_names(count: int, stem: str = "model") -> list[str]:
    """The files of a model in ``count`` shards."""
    numbered = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return numbered if count > 1 else [f"{stem}.safetensors"]


def write_index(
    folder: Path, names: Sequence[str], shards: Sequence[Mapping[str, Tensor]], index: str = INDEX
) -> None:
    """Writes which tensor is in which file (Hugging Face's scheme)."""
    weight_map = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": weight_map})
