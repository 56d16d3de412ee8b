"""Which checkpoints of a run to merge: paths, globs and folders, put in the order they were trained."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from merge_callback.checkpoints.checkpoint import read_manifest, step_above
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import MANIFEST, PROVENANCE, WINDOW
from merge_callback.checkpoints.model_folder import check_whole
from merge_callback.checkpoints.open import is_checkpoint_folder, recorded_step
from merge_callback.checkpoints.registry import READERS
from merge_callback.snapshots.safetensors_file import CorruptFileError

_NO_CHECKPOINT = re.compile(r"\.|tmp-|frozen-step=|.*(\.tmp|\.part|\.incomplete|~)$", re.DOTALL)
_REPEATED = re.compile(r"last(-v\d+)?(\.ckpt|\.safetensors)?", re.DOTALL)
_VERSION = re.compile(r"-(?:v(\d+)|last)(?=\.|$)")  # Lightning's, of a file whose name was taken; NeMo's
_OF_MERGES = (PROVENANCE, "mergekit_config.yml")
_MOST_TOLD = 12

T = TypeVar("T")


@dataclass(frozen=True)
class Selection:
    """The chosen checkpoints, oldest first, and what has to be told about the choice.

    Args:
        chosen: the checkpoints.
        steps: of each, where it is known.
        notes: how they were ordered, and what was left out and why.
        is_reordered: whether single checkpoints were given in another order.
    """

    chosen: list[Path]
    steps: list[int | None]
    notes: list[str]
    is_reordered: bool = False

    def lines(self) -> list[str]:
        """The choice, for people."""
        names = _distinct_names(self.chosen)
        told = [n if s is None else f"{n} (step {s})" for n, s in zip(names, self.steps, strict=True)]
        if len(told) > _MOST_TOLD:
            told[_MOST_TOLD // 2 : -_MOST_TOLD // 2] = ["…"]
        return [f"{len(self.chosen)} checkpoints, oldest first: {', '.join(told)}", *self.notes]


@dataclass(frozen=True)
class _Argument:
    """What one argument stands for; several checkpoints are yet to be ordered."""

    given: str
    found: list[Path]
    is_single: bool = False


def select(
    paths: Sequence[str],
    last: int | None = None,
    every: int = 1,
    *,
    first_step: int | None = None,
    last_step: int | None = None,
    keep_order: bool = False,
    keep_all: bool = False,
) -> Selection:
    """The checkpoints that the arguments of a command name, oldest first.

    An argument is one of these:

    - a checkpoint;
    - a glob, for the checkpoints it matches;
    - the folder of one run, for its ``.ckpt`` and ``.safetensors`` files and the folders in it that are
      checkpoints;
    - the callback's own folder, or ``window/`` in it, for the snapshots that its manifest lists, without
      those of a loss spike. The emissions beside them are merges already.

    All of them together are ordered by the step in the names, else by the recorded one, else by that of the
    folder around; what a glob or a run gives also by the epoch, or the one number in which the names differ.
    A shell passes the files that a glob matches in the order of the alphabet, so single checkpoints are
    ordered like the others; the order given stays where no step tells another.

    Left out are hidden and unfinished ones, what is frozen in a window, snapshots of a loss spike, merges
    beside other checkpoints, further names of the same file, a ``last.ckpt`` that repeats another one, and
    ``a.ckpt`` where ``a-v1.ckpt`` is of the same step: two callbacks, or two attempts, that saved the same.

    Args:
        paths: the arguments.
        last: keeps that many of the newest, of all arguments together, after ``every``.
        every: keeps every k-th, counted from the newest backwards.
        first_step: leaves out, before that, what is of an earlier step.
        last_step: and what is of a later one.
        keep_order: keeps the arguments in the order given.
        keep_all: leaves out nothing of what is there.

    Raises:
        FileNotFoundError: where an argument finds nothing.
        ValueError: where no order can be told, or it is not clear which checkpoints are meant.
    """
    if every < 1 or (last is not None and last < 1):
        raise ValueError(f"every={every} and last={last} must be at least 1")
    arguments = [_expand(given) for given in paths]
    everything = list(dict.fromkeys(path for argument in arguments for path in argument.found))
    steps = _steps(everything)
    left_out = {} if keep_all else _left_out(everything, steps)
    out = grouped(left_out).items()
    notes = [f"left out: {', '.join(_distinct_names(found)[:6])}: {reason}" for reason, found in out]
    arguments = [replace(a, found=[p for p in a.found if p not in left_out]) for a in arguments]
    given = [path for argument in arguments for path in _in_order(argument, steps)]
    if len(set(given)) < len(given) and not keep_all:
        given = list(dict.fromkeys(given))
        notes.append("those given twice are taken once; --keep-all takes them twice")
    ordered = given
    if not keep_order and len(arguments) > 1:
        ordered, unknown = _together(given, steps, all(argument.is_single for argument in arguments))
        if unknown is not None:
            notes.insert(0, f"they stay in the order given: the step of {unknown} is not known")
        elif ordered != given:
            notes.insert(0, "they were put in the order of their steps; --keep-order keeps the order given")
    within = _in_range(ordered, steps, first_step, last_step)
    chosen = within[::-1][::every][:last][::-1]
    if last is not None and len(chosen) < last:
        notes.append(f"fewer than --last {last} were found: {len(chosen)}")
    if dropped := len(ordered) - len(chosen):
        notes.append(f"left out: {dropped} more, by --from, --to, --every or --last")
    return Selection(chosen, [steps[path] for path in chosen], notes, ordered != given)


# What an argument stands for


def _expand(given: str) -> _Argument:
    path = Path(given).expanduser()
    if path.exists():
        return _of_folder(given, path) if path.is_dir() else _Argument(given, [path], is_single=True)
    if path.is_symlink():
        raise FileNotFoundError(f"{path}: links to {path.readlink()}, which does not exist")
    if not glob.has_magic(given):
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    matches = [Path(match) for match in sorted(glob.glob(os.path.expanduser(given), recursive=True))]
    candidates = [match for match in matches if _is_checkpoint(match, _run_suffixes() | _glob_suffixes())]
    if not candidates:
        raise FileNotFoundError(f"{given!r}: none of its {len(matches)} matches is a checkpoint")
    return _Argument(given, candidates)


def _of_folder(given: str, folder: Path) -> _Argument:
    if (folder / MANIFEST).is_file():
        return _Argument(given, _of_window(folder))
    check_whole(folder)
    itself = is_checkpoint_folder(folder)
    inside = [
        p for p in sorted(folder.iterdir()) if _is_checkpoint(p, frozenset() if itself else _run_suffixes())
    ]
    if not itself:
        return _Argument(given, _of_run(folder, inside))
    if others := [path for path in inside if not _is_merge(path)]:
        raise ValueError(
            f"{folder}: is a checkpoint, and so are folders in it ({others[0].name}, …); to take those, give "
            f"'{folder}/*/', to take it alone, its weights' file"
        )
    return _Argument(given, [folder], is_single=True)


def _of_run(folder: Path, inside: list[Path]) -> list[Path]:
    others = [path for path in inside if not _is_merge(path)]
    snapshots = _of_window(folder / WINDOW) if (folder / WINDOW / MANIFEST).is_file() else []
    if others and snapshots:
        raise ValueError(
            f"{folder}: holds checkpoints ({others[0].name}, …) beside a window of snapshots; "
            f"say which: '{folder}/*{others[0].suffix}' or {folder / WINDOW}"
        )
    if not snapshots and not inside:
        below = [f"'{p}'" for p in sorted(folder.iterdir()) if p.is_dir() and _holds_some(p)]
        mend = f"give {' or '.join(below)}" if below else f"for other files give a glob, e.g. '{folder}/*.pt'"
        raise FileNotFoundError(
            f"{folder}: no checkpoints in it (.ckpt or .safetensors files, or folders of one); {mend}"
        )
    return snapshots or inside


def _holds_some(folder: Path) -> bool:
    return any(_is_checkpoint(path, _run_suffixes()) for path in folder.iterdir())


def _of_window(window: Path) -> list[Path]:
    """The snapshots a manifest lists, oldest first: not those that only an older checkpoint needs."""
    found = [contained(window, r["file"]) for r in _listed(window) if r.get("file") and not r.get("in_spike")]
    if not found:
        raise FileNotFoundError(f"{window}: its manifest lists no snapshots fit to merge")
    return found


def _listed(window: Path) -> list[Mapping[str, Any]]:
    manifest = read_manifest(window)
    if not manifest.lists_snapshots:
        raise CorruptFileError(f"{manifest.path}: not the manifest of a window; give the snapshots as a glob")
    return manifest.snapshots


def _run_suffixes() -> frozenset[str]:
    return frozenset(suffix for reader in READERS for suffix in reader.suffixes)


def _glob_suffixes() -> frozenset[str]:
    return frozenset(suffix for reader in READERS for suffix in reader.glob_suffixes)


def _is_checkpoint(path: Path, suffixes: Collection[str]) -> bool:
    if _NO_CHECKPOINT.match(path.name) or not path.exists():
        return False
    return is_checkpoint_folder(path) or (path.is_file() and path.suffix in suffixes)


# What is left out


def _is_merge(path: Path) -> bool:
    """Whether a folder, or the one that a file of weights lies in, is what a merge has made."""
    places = [path] if path.is_dir() else [path.parent, path.resolve().parent]
    return any((place / name).exists() for name in _OF_MERGES for place in places)


def _left_out(found: Sequence[Path], steps: Mapping[Path, int | None]) -> dict[Path, str]:
    """The checkpoints that are no part of a merge, each with the reason."""
    out = {path: "what snapshots have in common" for path in found if path.name.startswith("frozen-step=")}
    spikes = _of_spikes({path.parent for path in found})
    out |= {path: "a snapshot of a loss spike" for path in found if path.absolute() in spikes}
    merges = [path for path in found if _is_merge(path)]
    if len(merges) < len(found):
        out |= dict.fromkeys(merges, "a merge already; --keep-all takes it in")
    first: dict[Path, Path] = {}
    for path in sorted({*found} - {*out}, key=lambda p: (p.is_symlink(), p)):
        if (same := first.setdefault(path.resolve(), path)) is not path:
            out[path] = f"the same as {same.name}"
    rest = [path for path in found if path not in out]
    newest: dict[tuple[int | None, Path], Path] = {}
    for path in sorted(rest, key=_version):
        beside = [steps[p] for p in rest if p.parent == path.parent and not _REPEATED.fullmatch(p.name)]
        if _REPEATED.fullmatch(path.name) and beside:
            if steps[path] is None or steps[path] in beside or None in beside:
                out[path] = "repeats another one"
        elif steps[path] is not None:
            named = steps[path], path.with_name(_VERSION.sub("", path.name))
            if (older := newest.get(named)) is not None:
                out[older] = f"of the same step as {path.name}"
            newest[named] = path
    return out


def _of_spikes(folders: Iterable[Path]) -> set[Path]:
    windows = [folder.absolute() for folder in folders if (folder / MANIFEST).is_file()]
    return {w / str(r.get("file")) for w in windows for r in _listed(w) if r.get("in_spike")}


def grouped(reasons: Mapping[T, str]) -> dict[str, list[T]]:
    """What was left out for each reason."""
    found: dict[str, list[T]] = {}
    for item, reason in reasons.items():
        found.setdefault(reason, []).append(item)
    return found


def _version(path: Path) -> int:
    found = _VERSION.search(path.name)
    return int(found[1] or 0) if found else 0


# The order


def _steps(found: Sequence[Path]) -> dict[Path, int | None]:
    steps = {path: recorded_step(path) for path in found}
    unknown = [path.parent for path, step in steps.items() if step is None]
    return {  # the folder's name tells it where only one checkpoint is in it: else it is the run's
        path: step_above(path) if step is None and unknown.count(path.parent) == 1 else step
        for path, step in steps.items()
    }


def _in_order(argument: _Argument, steps: Mapping[Path, int | None]) -> list[Path]:
    """What one argument stands for, oldest first."""
    found = argument.found
    if len(found) < 2:
        return found
    if by_step := _by_step(found, steps):
        return by_step
    if by_number := _by_number(found):
        return by_number
    raise ValueError(
        f"{argument.given}: no order can be told: not all of {found[0].name}, {found[1].name}, … have a step "
        "in their name or recorded; give the checkpoints one by one, oldest first"
    )


def _together(
    found: list[Path], steps: Mapping[Path, int | None], single: bool
) -> tuple[list[Path], str | None]:
    """What several arguments stand for, oldest first; else as given, and whose step is not known."""
    ordered = _by_step(found, steps, keep_equal=True) or (_by_number(found) if single else None)
    if ordered is not None:
        return ordered, None
    return found, next((path.name for path in found if steps[path] is None), None)


def _by_step(
    found: Sequence[Path], steps: Mapping[Path, int | None], keep_equal: bool = False
) -> list[Path] | None:
    known = [(step, path) for path in found if (step := steps[path]) is not None]
    if len(known) < len(found):
        return None
    if keep_equal:
        return [path for _, path in sorted(known, key=lambda item: item[0])]
    return [path for _, _, path in sorted((step, _natural(path.name), path) for step, path in known)]


def _by_number(found: Sequence[Path]) -> list[Path] | None:
    """By the epoch in the names, or by the one number they differ in."""
    named = sorted((_natural(n), n, p) for n, p in zip(_distinct_names(found), found, strict=True))
    in_order = [path for _, _, path in named]
    epochs = [re.search(r"epoch[=_-]?(\d+)", name) for _, name, _ in named]
    numbers = [int(epoch[1]) for epoch in epochs if epoch]
    if len(numbers) == len(found):
        return [path for _, path in sorted(zip(numbers, in_order, strict=True), key=lambda item: item[0])]
    columns = list(zip_longest(*(re.split(r"(\d+)", name) for _, name, _ in named)))
    differing = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if len(differing) != 1 or differing[0] % 2 == 0:  # every other part is a number
        return None
    return in_order


def _in_range(
    found: list[Path], steps: Mapping[Path, int | None], first: int | None, last: int | None
) -> list[Path]:
    if first is None and last is None:
        return found
    if unknown := [path for path in found if steps[path] is None]:
        raise ValueError(f"--from and --to need every step: that of {unknown[0]} is not known")
    low, high = first if first is not None else 0, float("inf") if last is None else last
    within = [path for path in found if low <= (steps[path] or 0) <= high]
    if not within:
        known = [step for step in steps.values() if step is not None]
        raise ValueError(f"no step lies in {low} … {high}: they are {min(known)} to {max(known)}")
    return within


def _distinct_names(found: Sequence[Path]) -> list[str]:
    """The names, with their folders' where those are what they differ in."""
    names = [path.name for path in found]
    return names if len(set(names)) == len(names) else [f"{p.parent.name}/{p.name}" for p in found]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]
