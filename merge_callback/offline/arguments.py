"""What an argument of a command stands for: a checkpoint, those that a glob matches, those of a run."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_callback.checkpoints.checkpoint import read_manifest, step_in_name
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import MANIFEST, PROVENANCE, WINDOW
from merge_callback.checkpoints.model_folder import check_whole
from merge_callback.checkpoints.open import is_checkpoint_folder
from merge_callback.checkpoints.other_formats import what_in_folder
from merge_callback.checkpoints.registry import glob_suffixes, run_suffixes
from merge_callback.snapshots.safetensors_file import CorruptFileError

_NO_CHECKPOINT = re.compile(
    r"\.|tmp-|frozen-step=|running-.*-step=|.*(\.tmp|\.part|\.incomplete|~)$"
    r"|(optim(izer)?|scheduler|scaler|sampler|rng_state|random_states|training_args)(_\d+)*(\.\w+)?$",
    re.DOTALL,
)
_OF_MERGES = (PROVENANCE, "mergekit_config.yml")


@dataclass(frozen=True)
class Argument:
    """What one argument stands for; several checkpoints are yet to be ordered."""

    given: str
    found: list[Path]
    is_single: bool = False


def expand(given: str) -> Argument:
    """Finds what an argument names.

    Raises:
        FileNotFoundError: if that is nothing.
        ValueError: if it is not clear which checkpoints are meant.
    """
    path = Path(given).expanduser()
    if path.exists():
        return _of_folder(given, path) if path.is_dir() else Argument(given, [path], is_single=True)
    if path.is_symlink():
        raise FileNotFoundError(f"{path}: links to {path.readlink()}, which does not exist")
    if not glob.has_magic(given):
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    matches = [Path(match) for match in sorted(glob.glob(os.path.expanduser(given), recursive=True))]
    candidates = [found for match in matches for found in _of_match(match)]
    if not candidates:
        endings = ", ".join(sorted(glob_suffixes()))
        raise FileNotFoundError(
            f"{given!r}: none of its {len(matches)} matches is a checkpoint (a folder of one, or a file that "
            f"ends in {endings})"
        )
    return Argument(given, candidates)


def _of_match(match: Path) -> list[Path]:
    """What a match of a glob stands for."""
    return [match] if _is_checkpoint(match, glob_suffixes()) else _of_step(match)


def _of_folder(given: str, folder: Path) -> Argument:
    if (folder / MANIFEST).is_file():
        return Argument(given, _of_window(folder))
    check_whole(folder)
    itself = is_checkpoint_folder(folder)
    suffixes = frozenset[str]() if itself else run_suffixes()
    inside = _inside(folder, suffixes)
    if not itself:
        return Argument(given, _of_run(folder, inside))
    if others := [path for path in inside if not is_merge(path)]:
        raise ValueError(
            f"{folder}: is a checkpoint, and so are folders in it ({others[0].name}, …); to take those, give "
            f"'{folder}/*/', to take it alone, its weights' file"
        )
    return Argument(given, [folder], is_single=True)


def _of_run(folder: Path, inside: list[Path]) -> list[Path]:
    others = [path for path in inside if not is_merge(path)]
    snapshots = _of_window(folder / WINDOW) if (folder / WINDOW / MANIFEST).is_file() else []
    if others and snapshots:
        raise ValueError(
            f"{folder}: holds checkpoints ({others[0].name}, …) and a window of snapshots; "
            f"say which: '{folder}/*{others[0].suffix}' or {folder / WINDOW}"
        )
    below = sorted(path for path in folder.iterdir() if path.is_dir())
    found = snapshots or inside or [path for place in below for path in _of_step(place)]
    if not found:
        raise FileNotFoundError(
            f"{folder}: no checkpoints in it (.ckpt or .safetensors files, or folders of one); "
            f"{_where_else(folder, below)}"
        )
    return found


def _of_step(folder: Path) -> list[Path]:
    """The checkpoint in the folder of a step, if there is one alone: OLMo-core's and Accelerate's lie so."""
    if not folder.is_dir() or step_in_name(folder) is None:
        return []
    inside = _inside(folder, run_suffixes())
    return inside if len(inside) == 1 else []


def _where_else(folder: Path, below: Sequence[Path]) -> str:
    """What to give instead of a folder without checkpoints."""
    if places := [f"'{path}'" for path in below if _inside(path, run_suffixes())]:
        return f"give {' or '.join(places)}"
    if other := what_in_folder(folder):
        return other
    found = sorted(path.suffix for path in folder.iterdir() if path.suffix in glob_suffixes())
    return f"for other files give a glob, e.g. '{folder}/*{next(iter(found), '.pt')}'"


def _inside(folder: Path, suffixes: Collection[str]) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if _is_checkpoint(path, suffixes)]


def _of_window(window: Path) -> list[Path]:
    """The snapshots a manifest lists, oldest first: not those that only an older checkpoint needs."""
    found = [
        contained(window, r["file"])
        for r in listed_snapshots(window)
        if r.get("file") and not r.get("in_spike")
    ]
    if not found:
        raise FileNotFoundError(f"{window}: its manifest lists no snapshots fit to merge")
    return found


def listed_snapshots(window: Path) -> list[Mapping[str, Any]]:
    """The records of the snapshots that the manifest of a window lists.

    Raises:
        CorruptFileError: if it is not one.
    """
    manifest = read_manifest(window)
    if not manifest.lists_snapshots:
        raise CorruptFileError(f"{manifest.path}: not the manifest of a window; give the snapshots as a glob")
    return manifest.snapshots


def _is_checkpoint(path: Path, suffixes: Collection[str]) -> bool:
    if _NO_CHECKPOINT.match(path.name) or not path.exists():
        return False
    return is_checkpoint_folder(path) or (path.is_file() and path.suffix in suffixes)


def is_merge(path: Path) -> bool:
    """Whether a folder, or the one that a file of weights lies in, is what a merge has made."""
    places = [path] if path.is_dir() else [path.parent, path.resolve().parent]
    return any((place / name).exists() for name in _OF_MERGES for place in places)
