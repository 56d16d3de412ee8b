"""The list of which file of a model's folder has which tensors (Hugging Face's scheme)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from merge_callback.checkpoints.checkpoint import read_json
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import CONFIG
from merge_callback.snapshots.files import CorruptFileError, read_object

_SHARED = re.compile(
    r"(.+\.)?(lm_head|embed_out|output_projection|output_layer|embed_tokens|wte|shared|word_embeddings|decoder)"
    r"\.(weight|bias)"
)
"""What the layers at both ends of a language model are called, which may share their weights."""


def read_index(folder: Path, name: str) -> dict[str, set[str] | None]:
    """The files that an index names, each with the names of its tensors.

    Raises:
        CorruptFileError: if it is broken, or names a file elsewhere.
    """
    path = contained(folder, name)
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{path}: has no weight_map, which tells the file of each tensor")
    files: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        contained(folder, file)
        files.setdefault(file, set()).add(tensor)
    return {**files}


def check_named(folder: Path, path: Path, expected: set[str] | None, found: Mapping[str, Tensor]) -> None:
    """Makes sure that a shard has the tensors that the index names, if there is one.

    An output layer that shares its weights with the embedding may be missing: some writers list it, and save
    the embedding alone.

    Raises:
        CorruptFileError: if it has others.
    """
    if expected is None:
        return
    missing, extra = sorted(expected - found.keys()), sorted(found.keys() - expected)
    if extra or not all(_SHARED.fullmatch(name) and _ties_embeddings(folder) for name in missing):
        raise CorruptFileError(
            f"{path}: other tensors than the index names: missing {missing[:3]} ({len(missing)} names), "
            f"unexpected {extra[:3]} ({len(extra)} names); index and shards must be of one save"
        )


def _ties_embeddings(folder: Path) -> bool:
    config = read_json(folder, CONFIG)
    inner = config.get("text_config")
    told = config.get(
        "tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else None
    )
    return told is not False
