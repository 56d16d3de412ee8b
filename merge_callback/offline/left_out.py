"""Which of the checkpoints that are found are no part of a merge, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from merge_callback.checkpoints.file_names import MANIFEST
from merge_callback.offline.arguments import is_merge, listed_snapshots

_REPEATED = re.compile(r"last(-v\d+)?(\.ckpt|\.safetensors)?", re.DOTALL)
_VERSION = re.compile(r"-(?:v(\d+)|last)(?=\.|$)")  # Lightning's, of a file whose name was taken; NeMo's

T = TypeVar("T")


def left_out(found: Sequence[Path], steps: Mapping[Path, int | None]) -> dict[Path, str]:
    """The checkpoints that are no part of a merge, each with the reason."""
    out: dict[Path, str] = {}
    for folder in {path.parent for path in found}:
        if (folder / MANIFEST).is_file():
            out |= _of_window([path for path in found if path.parent == folder], listed_snapshots(folder))
    out |= {path: "what snapshots have in common" for path in found if path.name.startswith("frozen-step=")}
    merges = [path for path in found if is_merge(path)]
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


def _of_window(found: Sequence[Path], records: Sequence[Mapping[str, Any]]) -> dict[Path, str]:
    """What of a window's folder is no part of a merge.

    Args:
        found: snapshots in it.
        records: those that its manifest lists.
    """
    spikes = {record.get("file") for record in records if record.get("in_spike")}
    listed = {record.get("file") for record in records}
    out = {path: "a snapshot of a loss spike" for path in found if path.name in spikes}
    others = [path for path in found if path.name not in listed]
    if len(others) < len(found):  # not if they are what was asked for
        out |= dict.fromkeys(others, "no longer in the window, which a checkpoint may still need")
    return out


def grouped(reasons: Mapping[T, str]) -> dict[str, list[T]]:
    """What was left out for each reason."""
    found: dict[str, list[T]] = {}
    for item, reason in reasons.items():
        found.setdefault(reason, []).append(item)
    return found


def _version(path: Path) -> int:
    found = _VERSION.search(path.name)
    return int(found[1] or 0) if found else 0
