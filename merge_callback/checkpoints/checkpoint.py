"""What an opened checkpoint is, and what the names of files tell."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import MANIFEST, WEIGHTS_ALONE
from merge_callback.snapshots.files import read_small
from merge_callback.snapshots.manifest import Manifest

_TIMES = {"k": 1000, "m": 1_000_000}
_COUNT = r"(\d+(?:\.\d+)?(?=[km](?![a-z0-9]))|\d+)([km](?![a-z0-9]))?"  # also 10k and 1.5M
_STEP = re.compile(
    rf"(?:(?:^|[^a-z])(?:global_?step|step|iteration|iter)s?[=_-]?|^ep\d+-ba){_COUNT}", re.IGNORECASE
)
_NUMBERED = re.compile(rf"(?:^|[^a-z])(?:checkpoint|ckpt)[=_-]?(?:\d+_(?=\d+\.pt$))?{_COUNT}", re.IGNORECASE)
"""Also fairseq's ``checkpoint_3_1200.pt``; others may count epochs."""


@dataclass
class Checkpoint:
    """The weights of one checkpoint, mapped from its files.

    Args:
        path: as it was given.
        tensors: by name, in the order of the file. They are views of memory maps: the page cache holds what
            is in use, so a checkpoint may be larger than the memory. Not to be written to.
        tied: further names of shared tensors, each with the name it is kept under.
        step: optimizer steps taken, if the checkpoint or its name knows.
        tokens: tokens seen, if the checkpoint knows.
        files: what was read.
        extras: what lies in a model's folder beside the weights (config, tokenizer, code, licence).
        format: ``"lightning"``, ``"pytorch"``, ``"safetensors"``, ``"dcp"``, ``"snapshot"``, ``"emission"``;
            of a reader that was added, its name.
        difference_to: step of the snapshot that this is stored as the difference to; ``None`` if it is whole.
        plain_config: ``config.json`` without its quantisation, if the tensors are no longer quantised.
        frozen: the file (or folder) beside it that holds what it has in common with other snapshots, if that
            is yet to be read, and ``frozen_checksum`` that one's SHA-256.
        segment: the phase of the learning rate it was taken in, and since when that lasts, if it knows.
        shards: of a model's folder, the names in each file, and the name of the ``index`` of them.
        left_out: the names of what else lies there, each with the reason why no merge takes it along.
        prefix: of a snapshot, what its run takes off the names it publishes; ``texts`` are the configuration
            files it then writes, ``copied`` the names it does not average, and ``dtypes`` those of its merges
            by the dtype they are stored in, if it is another.
        training_state: names of the tensors that were found to be no weights, and are not in ``tensors``.
    """

    path: Path
    tensors: Mapping[str, Tensor] = field(repr=False)
    tied: dict[str, str]
    step: int | None = None
    tokens: int | None = None
    files: list[Path] = field(default_factory=list)
    extras: list[Path] = field(default_factory=list)
    format: str = ""
    difference_to: int | None = None
    plain_config: Mapping[str, Any] | None = None
    frozen: str = ""
    frozen_checksum: str = ""
    segment: tuple[str, int | None] | None = None
    shards: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)
    index: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict, repr=False)
    prefix: str = ""
    texts: Mapping[str, str] = field(default_factory=dict, repr=False)
    copied: frozenset[str] = frozenset()
    training_state: Sequence[str] = field(default=(), repr=False)
    dtypes: Mapping[torch.dtype, torch.dtype] = field(default_factory=dict)


def step_in_name(path: Path, by_word: bool = False) -> int | None:
    """The optimizer step that a name tells: ``step=500``, ``checkpoint-500``, ``iter-2k`` and the like.

    ``model.safetensors`` and its like are asked for their folder's name, symlinks for their target's.

    Args:
        path: of the checkpoint.
        by_word: take no number that isn't called a step: that of ``checkpoint_5.pt`` may be an epoch's.
    """
    for place in (path, path.resolve()):
        name = place.parent.name if place.stem in WEIGHTS_ALONE else place.name
        if (step := _step_in(name, by_word)) is not None:
            return step
    return None


def step_above(path: Path) -> int | None:
    """The step that the folder of a checkpoint, or the one above that, has in its name."""
    folders = path.absolute().parents[:2]
    return next((step for folder in folders if (step := _step_in(folder.name)) is not None), None)


def _step_in(name: str, by_word: bool = False) -> int | None:
    if not (found := _STEP.search(name) or (None if by_word else _NUMBERED.search(name))):
        return None
    return round(float(found[1]) * _TIMES[found[2].lower()]) if found[2] else int(found[1])


def parse_count(value: object) -> int | None:
    """A count from a file's metadata, which holds text only; ``None`` for anything else."""
    return int(value) if isinstance(value, int | str) and re.fullmatch(r"\d{1,18}", str(value)) else None


def segment_of(record: Mapping[str, Any]) -> tuple[str, int | None] | None:
    """The phase of the learning rate that a record names, and since when that lasts."""
    phase = record.get("phase")
    return (phase, parse_count(record.get("since"))) if isinstance(phase, str) and phase else None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a window that may be anyone's; an empty one if there is none, or none that is sound.

    Raises:
        CorruptFileError, FileNotFoundError: see ``read_json``.
    """
    return Manifest(folder / MANIFEST, read_json(folder, MANIFEST))


def read_json(folder: Path, name: str) -> Mapping[str, Any]:
    """A JSON object beside the weights; empty if there is none, or none that is sound.

    Raises:
        CorruptFileError: if the file leads out of the folder, or is larger than metadata ever is.
        FileNotFoundError: if it is no regular file.
    """
    if not os.path.lexists(folder / name):
        return {}
    text = read_small(contained(folder, name))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
