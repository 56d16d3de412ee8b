"""What a sweep has found so far, in a folder: a sweep that was broken off goes on from there."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.snapshots.files import (
    CorruptFileError,
    append_line,
    clear,
    hidden_names,
    make_folder,
    open_regular,
    parse_object,
    plain,
    read_small,
    replacing,
    sync,
)
from merge_callback.snapshots.safetensors_file import file_checksum

RESULTS = "results.jsonl"
_OWN = re.compile(r"results(-\d+)?\.jsonl")
_DRAFT = hidden_names(rf"{_OWN.pattern}|results\.csv|pareto\.png")  # what a kill may have left
_HEAD = {"format": 1, "kind": "results of merge-callback sweep"}
_SAMPLES, _SAMPLE = 64, 4096  # blocks of a file that are compared, and their bytes


class SweepResults:
    """The scores of candidates, each on the disk as soon as it is known.

    Args:
        folder: made if it is not there; else it must be one of an earlier sweep, or empty.
        rank: of this process: each has a file of its own.

    Raises:
        ValueError: if it is another folder.
        OSError: if it can't be read or made.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self._own = folder / (RESULTS if rank == 0 else f"results-{rank}.jsonl")
        self.known: dict[str, dict[str, Any]] = {}
        self._written: set[str] = set()
        if os.path.lexists(folder):
            if not folder.is_dir():
                raise ValueError(f"{folder}: is no folder, and can't keep the results of a sweep")
            names = sorted(p.name for p in folder.iterdir() if not _DRAFT.fullmatch(p.name))
            own = [name for name in names if _OWN.fullmatch(name)]
            if names and not own:
                raise ValueError(
                    f"{folder}: has no {RESULTS}, and holds {names[0]!r}; name another folder with --results"
                )
            for name in own:
                self._read(folder / name)

    def begin(self) -> None:
        """Makes the folder, and this process's file in it; removes what a killed process has half written."""
        make_folder(self.folder)
        for path in self.folder.glob(f".{self._own.stem}.*"):
            if _DRAFT.fullmatch(path.name):
                clear(path)
        if not os.path.lexists(self._own):
            with replacing(self._own) as draft:  # else a kill leaves a file that is not taken for a sweep's
                draft.write_text(f"{json.dumps(_HEAD)}\n")
                sync(draft)

    def add(self, key: str, entry: Mapping[str, Any]) -> None:
        """Keeps what was found of a candidate, durably."""
        told = plain({"key": key, **entry})
        append_line(self._own, json.dumps(told, ensure_ascii=False))
        self.known[key] = told

    def replace(self, name: str, content: bytes) -> str:
        """Writes a table or a picture, in place of the one that an earlier sweep has written there.

        Returns:
            Why it was not written; empty if it was.
        """
        path = self.folder / name
        if os.path.lexists(path) and (path.is_symlink() or file_checksum(path) not in self._written):
            return f"{path} was edited, or is not this sweep's: it stays as it is"
        checksum = hashlib.sha256(content).hexdigest()
        append_line(self._own, json.dumps({"wrote": name, "checksum": checksum}))
        self._written.add(checksum)
        with replacing(path) as draft:
            draft.write_bytes(content)
            sync(draft)
        return ""

    def _read(self, path: Path) -> None:
        lines = read_small(path).decode(errors="replace").splitlines()
        if not lines or _parsed(lines[0], path) != _HEAD:
            raise CorruptFileError(f"{path}: not the results of a sweep; name another folder with --results")
        for line in lines[1:]:
            with suppress(CorruptFileError):  # one that a kill has cut off is found again
                found = _parsed(line, path)
                if isinstance(found.get("checksum"), str):
                    self._written.add(found["checksum"])
                elif isinstance(found.get("key"), str) and _is_scored(found.get("metrics")):
                    self.known[found["key"]] = found


def _parsed(line: str, path: Path) -> dict[str, Any]:
    return parse_object(line.encode(errors="replace"), str(path))


def _is_scored(metrics: object) -> bool:
    try:
        return isinstance(metrics, dict) and bool([float(value) for value in metrics.values()])
    except (TypeError, ValueError):
        return False


def key_of(*parts: object) -> str:
    """Names what a score depends on."""
    return hashlib.sha256(json.dumps(plain(list(parts)), sort_keys=True).encode()).hexdigest()[:24]


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells a checkpoint's files from others, by their sizes and by 64 blocks of 4 KiB spread over each.

    Raises:
        OSError: if one can't be read.
    """
    return key_of([_of_file(path) for path in sorted(checkpoint.files)])


def _of_file(path: Path) -> Sequence[object]:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        for i in range(_SAMPLES):
            file.seek(max(0, math.floor((size - _SAMPLE) * i / (_SAMPLES - 1))))
            digest.update(file.read(_SAMPLE))
    return path.name, size, digest.hexdigest()
