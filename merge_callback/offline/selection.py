"""Which checkpoints of a run to merge: paths, globs and folders, put in the order they were trained."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

from merge_callback.offline.checkpoint import is_checkpoint_folder, recorded_step
from merge_callback.offline.containment import contained
from merge_callback.offline.merge_record import PROVENANCE
from merge_callback.offline.opened import read_json
from merge_callback.snapshots.safetensors_file import CorruptFileError
from merge_callback.snapshots.window_folder import MANIFEST

_RUN_FILES = {".ckpt", ".safetensors"}
_GLOB_FILES = {*_RUN_FILES, ".pt", ".pth", ".bin"}
_NO_CHECKPOINT = re.compile(r"\.|tmp-|frozen-step=|.*(\.tmp|\.part|\.incomplete|~)$", re.DOTALL)
_REPEATED = re.compile(r"last(-v\d+)?(\.ckpt|\.safetensors)?", re.DOTALL)
_VERSION = re.compile(r"-v(\d+)(?=\.|$)")  # Lightning's, of a file whose name was taken
_WINDOW = "window"


def select(paths: Sequence[str], last: int | None = None, every: int = 1) -> list[Path]:
    """The checkpoints that the arguments of a command name, oldest first.

    An argument is one of these:

    - a checkpoint, taken as it is;
    - a glob, for the checkpoints it matches;
    - the folder of one run, for its ``.ckpt`` and ``.safetensors`` files and the folders in it that are
      checkpoints;
    - the callback's own folder, or ``window/`` in it, for the snapshots that its manifest lists, without
      those of a loss spike. The emissions beside them are merges already.

    What a glob or a run gives is ordered by the step in the names, else by the recorded one, else by the one
    number in which the names differ. Left out are hidden and unfinished ones, what is frozen in a window,
    further links to the same file, a ``last.ckpt`` beside others, which repeats one of them, and ``a.ckpt``
    where ``a-v1.ckpt`` is of the same step: two callbacks, or two attempts, that saved the same.

    Args:
        paths: the arguments, whose order is kept.
        last: keeps that many of the newest, of all arguments together.
        every: before that, keeps every k-th, counted from the newest backwards.

    Raises:
        FileNotFoundError: where an argument finds nothing.
        ValueError: where no order can be told, or it is not clear which checkpoints are meant.
    """
    if every < 1 or (last is not None and last < 1):
        raise ValueError(f"every={every} and last={last} must be at least 1")
    found = [checkpoint for given in paths for checkpoint in _expand(given)]
    return found[::-1][::every][:last][::-1]


def _expand(given: str) -> list[Path]:
    path = Path(given).expanduser()
    if path.exists():
        return _of_folder(path) if path.is_dir() else [path]
    if path.is_symlink():
        raise FileNotFoundError(f"{path}: links to {path.readlink()}, which does not exist")
    if not glob.has_magic(given):
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    matches = [Path(match) for match in sorted(glob.glob(os.path.expanduser(given), recursive=True))]
    candidates = _distinct(m for m in matches if _is_checkpoint(m, _GLOB_FILES))
    if not candidates:
        raise FileNotFoundError(f"{given!r}: none of its {len(matches)} matches is a checkpoint")
    return _in_order(given, candidates)


def _of_folder(folder: Path) -> list[Path]:
    if (folder / MANIFEST).is_file():
        return _of_window(folder)
    itself = is_checkpoint_folder(folder)
    inside = [p for p in sorted(folder.iterdir()) if _is_checkpoint(p, () if itself else _RUN_FILES)]
    if itself and inside:
        raise ValueError(
            f"{folder}: is a checkpoint, and so are folders in it ({inside[0].name}, …); to take those, give "
            f"'{folder}/*/', to take it alone, its weights' file"
        )
    return [folder] if itself else _of_run(folder, inside)


def _of_run(folder: Path, inside: list[Path]) -> list[Path]:
    merges = [p for p in inside if (p / PROVENANCE).exists()]
    others = _distinct(p for p in inside if p not in merges)
    snapshots = _of_window(folder / _WINDOW) if (folder / _WINDOW / MANIFEST).is_file() else []
    if others and (merges or snapshots):
        raise ValueError(
            f"{folder}: holds checkpoints ({others[0].name}, …) beside merges or a window of snapshots; "
            f"say which: '{folder}/*{others[0].suffix}' or {folder / _WINDOW}"
        )
    if snapshots:
        return snapshots
    if not inside:
        below = [f"'{p}'" for p in sorted(folder.iterdir()) if p.is_dir() and _holds_some(p)]
        mend = f"give {' or '.join(below)}" if below else f"for other files give a glob, e.g. '{folder}/*.pt'"
        raise FileNotFoundError(
            f"{folder}: no checkpoints in it (.ckpt or .safetensors files, or folders of one); {mend}"
        )
    return _in_order(str(folder), others or _distinct(merges))


def _holds_some(folder: Path) -> bool:
    return any(_is_checkpoint(path, _RUN_FILES) for path in folder.iterdir())


def _of_window(window: Path) -> list[Path]:
    """The snapshots a manifest lists, oldest first: not those that only an older checkpoint needs."""
    records = read_json(window, MANIFEST).get("snapshots")
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise CorruptFileError(
            f"{window / MANIFEST}: not the manifest of a window; give the snapshots as a glob"
        )
    found = [contained(window, r["file"]) for r in records if r.get("file") and not r.get("in_spike")]
    if not found:
        raise FileNotFoundError(f"{window}: its manifest lists no snapshots fit to merge")
    return found


def _is_checkpoint(path: Path, suffixes: Iterable[str]) -> bool:
    if _NO_CHECKPOINT.match(path.name) or not path.exists():
        return False
    return is_checkpoint_folder(path) or (path.is_file() and path.suffix in suffixes)


def _distinct(paths: Iterable[Path]) -> list[Path]:
    """Each file once, by its own name rather than a link's; ``last.ckpt`` only where it is alone."""
    by_target: dict[Path, Path] = {}
    for path in sorted(paths, key=lambda p: (p.is_symlink(), p)):
        by_target.setdefault(path.resolve(), path)
    found = list(by_target.values())
    return [p for p in found if not _REPEATED.fullmatch(p.name)] or found


def _in_order(given: str, found: list[Path]) -> list[Path]:
    if len(found) == 1:
        return found
    steps = [recorded_step(path) for path in found]
    known = [step for step in steps if step is not None]
    if len(known) < len(found):
        return _by_number(given, found)
    newest: dict[tuple[int, Path], Path] = {}
    for path, step in sorted(zip(found, known, strict=True), key=lambda item: _version(item[0])):
        unversioned = path.with_name(_VERSION.sub("", path.name))
        newest[step, unversioned] = path
    return [path for _, _, path in sorted((step, _natural(p), p) for (step, _), p in newest.items())]


def _version(path: Path) -> int:
    found = _VERSION.search(path.name)
    return int(found[1]) if found else 0


def _by_number(given: str, found: list[Path]) -> list[Path]:
    """By the epoch in the names, or by the one number they differ in."""
    epochs = [re.search(r"epoch[=_-]?(\d+)", path.name) for path in found]
    numbered = [(int(e[1]), _natural(path), path) for e, path in zip(epochs, found, strict=True) if e]
    if len(numbered) == len(found):
        return [path for _, _, path in sorted(numbered)]
    columns = list(zip_longest(*(re.split(r"(\d+)", path.name) for path in found)))
    differing = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if len(differing) != 1 or differing[0] % 2 == 0:  # every other part is a number
        raise ValueError(
            f"{given}: no order can be told: not all of {found[0].name}, {found[1].name}, … have a step in "
            "their name or recorded; give the checkpoints one by one, oldest first"
        )
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", path.name)]
