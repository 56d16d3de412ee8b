"""The rolling window of the last N snapshots, and its folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from merge_callback.snapshots.safetensors_file import (
    CorruptFileError,
    arena_header,
    difference,
    read_header,
    write_json,
)
from merge_callback.snapshots.storage import Snapshot, SnapshotStore

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class Window:
    """The last ``size`` snapshots of a run, oldest first.

    With a folder, every snapshot is one safetensors file in it, named in ``manifest.json``. A file is
    removed once neither the window nor one of the last two checkpoints of the trainer needs it: so a run
    that is killed, even while it saves, finds the window of the checkpoint it resumes from.

    Args:
        size: N.
        store: captures, loads and releases snapshots.
        run_id: of the run; a folder that holds another run's window is moved aside, never written over.
    """

    def __init__(self, size: int, store: SnapshotStore, run_id: str) -> None:
        self.size, self.store, self.run_id = size, store, run_id
        self.snapshots: list[Snapshot] = []
        self._saved: list[list[str]] = []

    def __len__(self) -> int:
        return len(self.snapshots)

    def append(self, snapshot: Snapshot, tensors: Mapping[str, Tensor]) -> None:
        """Captures ``tensors`` as the newest snapshot and drops the oldest beyond ``size``.

        Raises:
            NonFiniteSnapshotError: where a tensor holds NaN or Inf; the window is unchanged.
            OSError: where a file can't be written. In memory the snapshot is admitted all the same.
        """
        try:
            self.store.put(snapshot, tensors)
        finally:
            if snapshot.arena is not None:
                self.snapshots.append(snapshot)
                while len(self.snapshots) > self.size:
                    self.store.release(self.snapshots.pop(0))
        self._commit()

    def relabel(self, phase: str, since: int) -> None:
        """Puts the snapshots taken after step ``since`` into this segment: a change shows only later."""
        for snapshot in self.snapshots:
            if snapshot.lr_step > since:
                snapshot.phase, snapshot.since = phase, since

    def segment(self) -> list[Snapshot]:
        """The snapshots a merge may hold: those of the newest one's phase, never any of the warm-up."""
        if not self.snapshots or self.snapshots[-1].phase == "warmup":
            return []
        newest = self.snapshots[-1]
        return [s for s in self.snapshots if (s.phase, s.since) == (newest.phase, newest.since)]

    def pair(self, lag: int) -> tuple[Snapshot, Snapshot] | None:
        """The newest snapshot and the one ``lag`` before it, if both come after the warm-up."""
        if len(self.snapshots) <= lag or self.snapshots[-1 - lag].phase == "warmup":
            return None
        return self.snapshots[-1 - lag], self.snapshots[-1]

    def state_dict(self) -> dict[str, Any]:
        """The window as primitives: its snapshots' records. From now on a checkpoint needs their files."""
        files = [s.file for s in self.snapshots]
        self._saved = [*(saved for saved in self._saved if saved != files), files][-2:]
        return {
            "run_id": self.run_id,
            "folder": str(self.store.folder.absolute()) if self.store.folder else "",
            "layout": self.store.layout.hash,
            "snapshots": [s.record() for s in self.snapshots],
        }

    def layout_difference(self, state: Mapping[str, Any]) -> str:
        """How the model of a ``state_dict`` differs from this one, in one line; empty where it does not."""
        layout = self.store.layout
        if state["layout"] == layout.hash or not state["snapshots"]:
            return ""
        for record in state["snapshots"]:
            with contextlib.suppress(OSError, CorruptFileError):
                header, _ = read_header(self._find(record["file"], state["folder"]))
                header.pop("__metadata__", None)
                return difference(header, arena_header(layout)) or "the order of the tensors"
        return "their layouts have different hashes"

    def restore(self, state: Mapping[str, Any], last_step: int) -> list[str]:
        """Takes the snapshots of a ``state_dict`` back, up to optimizer step ``last_step``.

        Every file is verified. One that is missing, truncated or altered is left out.

        Returns:
            One line for each snapshot left out: which and why.
        """
        self.snapshots, problems = [], []
        for record in state["snapshots"]:
            snapshot = Snapshot(**record)
            if snapshot.step > last_step:
                continue
            try:
                self._load(snapshot, state["folder"])
            except (CorruptFileError, OSError) as error:
                problems.append(f"snapshot of step {snapshot.step}: {error}")
            else:
                self.snapshots.append(snapshot)
        self.snapshots = self.snapshots[-self.size :]
        self._saved = [[record["file"] for record in state["snapshots"]]]
        self._commit()
        return problems

    def truncate(self, last_step: int) -> None:
        """Drops the snapshots newer than optimizer step ``last_step``."""
        self.snapshots = [s for s in self.snapshots if s.step <= last_step]

    def claim_folder(self) -> IO[str] | None:
        """Makes the folder this run's own; another run's window in it is moved aside.

        Returns:
            The open lock file (closing it lets go), or ``None`` without a folder.

        Raises:
            BlockingIOError: where another callback, in this process or another, is using the folder.
            OSError: where the folder can't be created or written.
        """
        folder = self.store.folder
        if folder is None:
            return None
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder.parent / f".{folder.name}.lock")
        owner = _read_manifest(folder).get("run_id")
        if owner not in (None, self.run_id):
            aside = next(p for p in _aside(folder) if not p.exists())
            os.replace(folder, aside)
            log.warning("%s holds the window of another run; it was moved to %s", folder, aside)
        folder.mkdir(exist_ok=True)
        return lock

    def _load(self, snapshot: Snapshot, recorded_folder: str) -> None:
        """Loads a snapshot's file from the own folder, or takes it over from where it was written."""
        folder = self.store.folder
        found = self._find(snapshot.file, recorded_folder)
        if folder is not None and found.parent != folder:
            _link_or_copy(found, folder / snapshot.file)
            found = folder / snapshot.file
        self.store.load(snapshot, found)

    def _find(self, file: str, recorded_folder: str) -> Path:
        if not file:
            raise FileNotFoundError("it lived in memory only and ended with its process")
        own = self.store.folder
        places = [own, *(p for p in _aside(own) if p.exists())] if own is not None else []
        places.append(Path(recorded_folder))
        for place in places:
            if (place / file).is_file():
                return place / file
        raise FileNotFoundError(f"{Path(recorded_folder) / file} is gone")

    def _commit(self) -> None:
        """Writes the manifest, then removes the files nobody needs: a kill in between loses nothing."""
        folder = self.store.folder
        if folder is None:
            return
        manifest = {
            "format": 1,
            "run_id": self.run_id,
            "layout": self.store.layout.hash,
            "snapshots": [s.record() for s in self.snapshots],
        }
        write_json(folder / MANIFEST, manifest)
        needed = {MANIFEST, *(s.file for s in self.snapshots), *(f for files in self._saved for f in files)}
        for path in folder.iterdir():
            if path.name not in needed:
                path.unlink(missing_ok=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return {"run_id": "unreadable"}
    return manifest if isinstance(manifest, dict) else {"run_id": "unreadable"}


def _aside(folder: Path) -> Sequence[Path]:
    return [folder.with_name(f"{folder.name}.old-{k}") for k in range(1, 100)]


def _link_or_copy(source: Path, target: Path) -> None:
    # A hard link costs no room, and snapshot files are only ever removed, never written to.
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _lock(path: Path) -> IO[str]:
    file = open(path, "w")  # noqa: SIM115 - held for as long as the run uses the folder
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except (ImportError, OSError):  # no such locks on this platform or file system
        pass
    return file
