"""What lies in a model's folder beside the weights: what a merge takes along, and what it does not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from merge_callback.checkpoints.checkpoint import parse_count, read_json
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    GENERATION_CONFIG,
    PROVENANCE,
    TRAINER_STATE,
    WEIGHTS_ALONE,
)
from merge_callback.checkpoints.merge_record import find_record
from merge_callback.snapshots.files import CorruptFileError, read_small

_MOST = 1 << 28  # bytes; the largest tokenizers have about 40 million
_MOST_FILES = 2000
_NEEDED = (
    ADAPTER_CONFIG,
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
)
"""What a loader may not go without: where one of these can't be taken, nothing is merged."""

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|npz|distcp|tflite|ot|pkl|pickle|pb)"
    r"(\.index.*\.json)?",
    re.DOTALL,
)
_OF_THE_RUN = re.compile(
    r"trainer_state\.json|(train|eval|all|test|predict)_results\.json|events\.out\.tfevents.*|latest|best"
    r"|.*\.(log|lock)"
)
_PARTS = ("model_index.json", "modules.json")  # of diffusers and of Sentence Transformers


def extras(folder: Path, read: set[str]) -> tuple[list[Path], dict[str, str]]:
    """The files to take along, those of sub-folders among them, and the names of others with the reason.

    Args:
        folder: with a model in it.
        read: names of the files that its weights were read from.

    Raises:
        CorruptFileError: if a file that the model needs leads out of the folder, or is no such file.
        FileNotFoundError: if one is no regular file.
    """
    taken: list[Path] = []
    left_out: dict[str, str] = {}
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name in read or name == PROVENANCE:
            continue
        if name == ADAPTER_CONFIG and ADAPTER_WEIGHTS not in read:
            left_out[name] = f"belongs to {ADAPTER_WEIGHTS}"
        elif reason := _reason(path):
            left_out[name] = reason
        elif not path.is_dir():
            taken.append(path)
        elif len(inside := _below(path)) + len(taken) > _MOST_FILES:
            left_out[name] = f"it has more than {_MOST_FILES} files"
        elif reason := next(filter(None, map(_reason, inside)), ""):
            left_out[name] = reason
        else:
            taken += inside
    return taken, left_out


def check_whole(folder: Path) -> None:
    """Makes sure that a folder is one model, and none that is put together from those in its sub-folders.

    Raises:
        ValueError: if it is, with what to do.
    """
    for listing in _PARTS:
        if not os.path.lexists(folder / listing):
            continue
        text = read_small(contained(folder, listing)).decode(errors="replace")
        named = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and f'"{path.name}"' in text]
        parts = [name for name in named if any(_WEIGHTS.fullmatch(p.name) for p in _below(folder / name))]
        if parts:
            raise ValueError(
                f"{folder}: is put together from the models in {', '.join(parts)} (see {listing}); merge "
                f"each of these, e.g. every checkpoint's {parts[0]} with --output merged/{parts[0]}, and "
                "copy the other files of one checkpoint there, too"
            )


def _below(folder: Path) -> list[Path]:
    """Files and links in a folder and those under it, up to one more than are ever taken."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place, name) for name in sorted((*files, *links))]
        if len(found) > _MOST_FILES:
            break
    return found


def _reason(path: Path) -> str:
    """Why a file, or a whole sub-folder, is not taken along; empty if it is.

    Raises:
        CorruptFileError, FileNotFoundError: see above.
    """
    if path.name.startswith(".") or path.name == "__pycache__":
        return "hidden"
    if path.is_dir():
        return "a link to a folder" if path.is_symlink() else ""
    if _WEIGHTS.fullmatch(path.name):
        return "other weights, or the state of the training"
    if _OF_THE_RUN.fullmatch(path.name):
        return "tells of the run"
    try:
        size = contained(path.parent, path.name).stat().st_size
        if size > _MOST:
            raise CorruptFileError(
                f"{path}: has {size} bytes, expected a configuration or tokenizer, which is less"
            )
    except (CorruptFileError, FileNotFoundError) as error:
        if any(fnmatch(path.name, pattern) for pattern in _NEEDED):
            raise
        return str(error)
    return ""


def named_below(folder: Path) -> Iterator[tuple[str, bool]]:
    """Everything below a folder by its name relative to it, and whether it is a folder, which come last."""
    folders: list[str] = []
    for place, inside, files in os.walk(folder):
        base = Path(place).relative_to(folder)
        links = [name for name in inside if os.path.islink(os.path.join(place, name))]
        yield from (((base / name).as_posix(), False) for name in (*files, *links))
        folders += [(base / name).as_posix() for name in inside if name not in links]
    yield from ((name, True) for name in reversed(folders))


def folder_step(folder: Path) -> int | None:
    """The step that a folder's ``merge.json`` or ``trainer_state.json`` tells."""
    merge = find_record(folder)
    return merge.step if merge.content else parse_count(trainer_record(folder).get("step"))


def step_beside(path: Path) -> int | None:
    """The step that the records beside a file tell, if it is what holds the weights of its folder's model."""
    return folder_step(path.parent) if path.stem in WEIGHTS_ALONE else None


def trainer_record(folder: Path) -> Mapping[str, Any]:
    """Step and tokens, as Hugging Face's Trainer notes them beside the weights."""
    state = read_json(folder, TRAINER_STATE)
    return {"step": state.get("global_step"), "tokens": state.get("num_input_tokens_seen") or None}
